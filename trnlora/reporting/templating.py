"""The Jinja templates in this folder (report.html.jinja, card.md.jinja)."""

from typing import Any


def render(template: str, context: dict[str, Any]) -> str:
    """A template filled with `context`; values are escaped in templates of HTML. An undefined name is an error."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("trnlora.reporting", "."),
        autoescape=template.endswith(".html.jinja"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template(template).render(context)
