"""`cortex plugins`: what is built in stands in the list with where it comes from."""

import json

from click.testing import CliRunner

from cortex.cli import main


def test_built_in_dialects_and_engines_are_listed():
    result = CliRunner().invoke(main, ["plugins", "--json"])
    assert result.exit_code == 0
    found = {(item["kind"], item["name"]): item["plugin"] for item in json.loads(result.stdout)}
    assert found["dialect", "openai"] == "cortex.harnesses.openai"
    assert found["engine", "torch"] == "cortex.neuron.torch_engine.TorchFactory"
