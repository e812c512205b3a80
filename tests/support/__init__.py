"""What several test files share: models, stages, projects, servers, a browser."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
