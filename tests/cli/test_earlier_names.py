"""The tests of all commands in this process fail where one uses the cache's earlier names; here they are seen to."""

import pytest
import torch

from ..serving.small import small_text_model


@pytest.mark.parametrize("name", ["past_key_values", "cache_params"])
def test_a_command_that_used_an_earlier_name_would_fail(name):
    model, ids = small_text_model().model, torch.tensor([[5, 6, 7]])
    output = model(ids, use_cache=True)
    for use in (model, model.generate):
        with pytest.raises(FutureWarning, match=name):
            use(ids, **{name: output.cache})
    with pytest.raises(AssertionError, match=name):
        output[name]
