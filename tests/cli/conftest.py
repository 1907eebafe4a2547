"""No command may use the cache's earlier names: transformers warns (see pyproject.toml), and says so in its log."""

import pytest
from transformers.utils import generic


@pytest.fixture(autouse=True)
def no_log_of_earlier_names(monkeypatch):
    say = generic.logger.warning_once

    def refuse(message, *arguments, **named):
        assert "past_key_values" not in message, message
        say(message, *arguments, **named)

    monkeypatch.setattr(generic.logger, "warning_once", refuse, raising=False)
