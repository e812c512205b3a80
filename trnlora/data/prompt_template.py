"""A prompt template as text: what is recorded with the rows that were rendered with it, and with an adapter.

`trnlora.data.templates` loads and renders it.
"""

from hashlib import sha256

from trnlora.readers import Line, StrictModel, Text
from trnlora.sources import without_machine_path

# What is between a turn's text and its context, by data.prompt_template; a file's is that of `chat`.
_CONTEXT_HEADINGS = {"alpaca": "\n\n### Input:\n", "dolly": "\n\n### Context:\n", "chat": "\n\n"}

NAMES = tuple(_CONTEXT_HEADINGS)


def context_heading(name: str) -> str:
    """What stands between a turn's text and its context under data.prompt_template `name`."""
    return _CONTEXT_HEADINGS.get(name, _CONTEXT_HEADINGS["chat"])


class TemplateText(StrictModel):
    """A prompt template.

    name: data.prompt_template. jinja: a chat template, as `vllm serve --chat-template` takes it, with the values of
    data.template_kwargs in it.
    """

    name: Line
    jinja: Text

    def __str__(self) -> str:
        """What messages call it: two templates may have one name and other variables."""
        return f"{without_machine_path(self.name)} (sha256 {sha256(self.jinja.encode()).hexdigest()[:8]}…)"

    def gives_prompts_of(self, other: "TemplateText") -> bool:
        """Do both make the same prompts of the same messages, whatever their names?"""
        return (self.jinja, context_heading(self.name)) == (other.jinja, context_heading(other.name))
