"""How often: `python -m pytest tests/fuzz --hypothesis-profile soak` tries fifty times as much as the slow tests do."""

from hypothesis import settings

settings.register_profile("soak", max_examples=5000)
