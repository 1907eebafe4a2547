"""An exported folder gives the same to those who have transformers only as to those who have this package."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from ttt_e2e.model_cards import ExportRequest, prepare_export, write_export

from . import observing
from .clean_environment import CleanEnvironment
from .saved import KINDS, saved_model


def exported(folder, kind, **options):
    """A Hub folder of a random model."""
    model = saved_model(folder / "saved" / kind, kind)
    return write_export(prepare_export(ExportRequest(str(model), folder / f"hub-{kind.replace('_', '-')}", **options)))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("exported")


@pytest.fixture(scope="module")
def hub(place):
    """Hub folders by the kind of model."""
    return {kind: exported(place, kind) for kind in KINDS}


@pytest.fixture(scope="module")
def elsewhere(hub, place):
    """What is seen of each Hub folder where there is no package."""
    folders = [str(folder) for folder in hub.values()]
    output = place / "seen.pt"
    CleanEnvironment(place / "clean").run(observing.__file__, str(output), str(place / "elsewhere"), *folders)
    seen = torch.load(output)
    return {kind: seen[str(folder)] for kind, folder in hub.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_everything_is_as_with_the_package(kind, hub, elsewhere, place):
    here = observing.observations(hub[kind], place / "here" / kind)
    assert here.keys() == elsewhere[kind].keys()
    for name, value in here.items():
        found = elsewhere[kind][name]
        if torch.is_tensor(value):
            assert torch.allclose(found, value, rtol=1e-5, atol=1e-5), name
        elif name == "trained":
            assert found == pytest.approx(value, rel=1e-5)
        else:
            assert found == value, name


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_saved_there_is_complete_and_the_same_model(kind, hub, elsewhere, place):
    again = place / "elsewhere" / hub[kind].name / "again"
    code = {path.name: path.read_text() for path in hub[kind].glob("*.py")}
    assert code and code == {path.name: path.read_text() for path in again.glob("*.py")}
    settings = [json.loads((folder / "config.json").read_text()) for folder in (hub[kind], again)]
    assert settings[0]["auto_map"] == settings[1]["auto_map"]
    ids = observing.AutoTokenizer.from_pretrained(again)(observing.PROMPT, return_tensors="pt").input_ids
    logits = observing.load(again)(ids).logits
    torch.testing.assert_close(logits, elsewhere[kind]["after training"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_with_the_package_its_own_classes_are_used(kind, hub):
    for trust in ({}, {"trust_remote_code": True}):
        model = AutoModelForCausalLM.from_pretrained(hub[kind], **trust)
        assert type(model).__module__.startswith("ttt_e2e.")


@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_those_that_were_saved(kind, hub, place):
    saved, sent = (load_file(folder / "model.safetensors") for folder in (place / "saved" / kind, hub[kind]))
    assert saved.keys() == sent.keys() and all(torch.equal(saved[name], sent[name]) for name in saved)


@pytest.mark.slow
def test_the_evaluation_harness_reads_it(hub, place):
    pytest.importorskip("lm_eval")
    tasks = place / "tasks"
    tasks.mkdir()
    (tasks / "texts.jsonl").write_text(json.dumps({"text": observing.PROMPT * 3}) + "\n")
    (tasks / "texts.yaml").write_text(
        "task: texts\ndataset_path: json\noutput_type: loglikelihood_rolling\ntest_split: train\n"
        f"dataset_kwargs: {{data_files: {tasks / 'texts.jsonl'}}}\n"
        "doc_to_text: ''\ndoc_to_target: '{{text}}'\nmetric_list: [{metric: word_perplexity}]\n"
    )
    CleanEnvironment(place / "harness").run(
        "-m", "lm_eval", "--model", "hf", "--device", "cpu", "--include_path", str(tasks), "--tasks", "texts",
        "--model_args", f"pretrained={hub['ttt_e2e']},trust_remote_code=True,max_length=64",
        "--output_path", str(place / "harness.json"),
    )  # fmt: skip
    (report,) = place.glob("harness*.json")
    perplexity = json.loads(report.read_text())["results"]["texts"]["word_perplexity,none"]
    assert 1 < perplexity < float("inf")


OLDER = """
import sys, transformers
transformers.__version__ = "5.23.1"
for folder in sys.argv[1:]:
    try:
        if folder == "package":
            import ttt_e2e
        else:
            transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
        print("loaded")
    except ImportError as error:
        print(error)
"""


def test_an_older_transformers_is_refused_in_one_line(hub, place):
    """By every exported folder without the package, and by the package."""
    clean = CleanEnvironment(place / "older").run("-c", OLDER, *map(str, hub.values()))
    package = subprocess.run([sys.executable, "-c", OLDER, "package"], text=True, capture_output=True, timeout=300)
    lines = [line for line in (clean + package.stdout).splitlines() if "[transformers]" not in line]
    message = "needs transformers 5.24.0 or later, and this is 5.23.1: pip install"
    assert len(lines) == len(KINDS) + 1 and all(message in line for line in lines), lines
