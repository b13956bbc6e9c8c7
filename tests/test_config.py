"""Configuration: files as users have them load, and every mistake is one line that helps."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cortex.config import (
    ConfigError,
    GatewayConfig,
    ModelsConfig,
    NeuronConfig,
    all_keys,
    load_gateway,
    load_models,
    load_neuron,
)

GOOD = """
[gateway]
listen = "0.0.0.0:31313"
metrics_listen = "0.0.0.0:31314"
[eviction]
strategy = "lru"
defrag_after_cycles = 50
[[neurons]]
name = "beast"
endpoint = "http://beast.internal:13131"
"""


@pytest.fixture
def write(tmp_path):
    def write(text, name="cortex.toml"):
        path = tmp_path / name
        path.write_text(text)
        return path

    return write


def test_the_file_that_users_have_loads(write):
    config = load_gateway(write(GOOD), {})
    assert config.gateway.listen == "0.0.0.0:31313"
    assert [node.name for node in config.neurons] == ["beast"]


@pytest.mark.parametrize("seconds", ["inf", "nan", "0.0", "-1.0", "86401.0"])
@pytest.mark.parametrize(
    ("load", "section", "key"),
    [
        (load_neuron, "harness.torch", "watchdog_s"),
        (load_gateway, "gateway", "poll_interval_s"),
        (load_gateway, "gateway", "idle_timeout_s"),
    ],
)
def test_a_time_is_one_that_can_pass(write, load, section, key, seconds):
    with pytest.raises(ConfigError, match=re.escape(f"{section}.{key}")):
        load(write(f"[{section}]\n{key} = {seconds}"), {})


def test_a_gateway_takes_bodies(write):
    with pytest.raises(ConfigError, match=r"gateway\.body_limit_mb: .*>= 1"):
        load_gateway(write("[gateway]\nbody_limit_mb = 0"), {})


@pytest.mark.parametrize("secret", ["clé", "🦄", "two\\nlines", " a space before", "tab\\there"])
@pytest.mark.parametrize(
    ("load", "text", "key"),
    [
        (load_neuron, 'node_token = "{}"', "node_token"),
        (load_gateway, '[[keys]]\nname = "alice"\nkey = "{}"', "keys.alice.key"),
        (
            load_gateway,
            '[[neurons]]\nname = "b"\nendpoint = "http://b"\nnode_token = "{}"',
            "neurons.b.node_token",
        ),
    ],
)
def test_what_no_header_can_carry_is_refused_and_not_shown(write, load, text, key, secret):
    path = write("")
    path.write_bytes(text.format(secret).encode())
    with pytest.raises(ConfigError, match=re.escape(key)) as refused:
        load(path, {})
    assert secret not in str(refused.value)
    path.write_bytes(text.format("a long random text, 100% of it!").encode())
    load(path, {})


def test_without_a_file_there_are_defaults():
    assert load_gateway(None, {}) == GatewayConfig()
    assert load_neuron(None, {}) == NeuronConfig()


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("[gateway]\nlisten = 3", ["gateway.listen", "expected `str`", "`int`"]),
        ('[gateway]\nlisen = "x"', ["gateway.lisen", "'listen'"]),
        ('[gatway]\nlisten = "x"', ["gatway", "'gateway'"]),
        ('[[nodes]]\nname = "x"', ["nodes", "[[neurons]]"]),
        ('[[neurons]]\nname = "x"\nendpoint = "http://x"\nvram_mb = 1', ["neurons.vram_mb", "leave it out"]),
        ('[entitlements]\nrequire_auth = true', ["entitlements", "[[keys]]"]),
        ('[[neurons]]\nname = "x"', ["neurons[0]", "endpoint"]),
        ('[[neurons]]\nname = "x"\nendpoint = "beast:1"', ["neurons.x.endpoint", "http://"]),
        ('[[neurons]]\nname="x"\nendpoint="http://a"\n[[neurons]]\nname="x"\nendpoint="http://b"', ["twice"]),
        ("x = = 1", ["not valid TOML", "line 1"]),
    ],
)
def test_a_mistake_is_one_line_that_names_file_key_and_remedy(write, text, told):
    path = write(text)
    with pytest.raises(ConfigError) as refused:
        load_gateway(path, {})
    message = str(refused.value)
    assert "\n" not in message
    for part in [str(path), *told]:
        assert part in message


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"nowhere\.toml: there is no such file"):
        load_gateway(tmp_path / "nowhere.toml", {})


def test_the_environment_wins(write):
    environ = {"CORTEX_GATEWAY__LISTEN": "127.0.0.1:1", "CORTEX_GATEWAY__ALLOW_ANONYMOUS": "true"}
    section = load_gateway(write(GOOD), environ).gateway
    assert (section.listen, section.allow_anonymous) == ("127.0.0.1:1", True)
    assert load_neuron(None, {"NEURON_HARNESS__TORCH__THREADS": "3"}).harness.torch.threads == 3


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("[admission]\nmax_running = 0", ["admission.max_running", ">= 1"]),
        ("[admission]\nmax_waiting = -1", ["admission.max_waiting", ">= 0"]),
        ("[admission]\nmax_wait_s = -0.5", ["admission.max_wait_s", ">= 0"]),
        ("[admission]\nmax_wait_s = nan", ["admission.max_wait_s", "0"]),
        ("[admission]\nmax_wait_s = inf", ["admission.max_wait_s", "86400"]),
        ("body_limit_mb = -1", ["body_limit_mb", ">= 1"]),
        ("memory_limit_mb = 0", ["memory_limit_mb", ">= 1"]),
        ("[harness.torch]\nthreads = 0", ["harness.torch.threads", ">= 1"]),
        ('[[default_models]]\nmodel_id = ""', ["default_models[0].model_id", "length >= 1"]),
        ('[[default_models]]\nmodel_id = "m"\nquant = ""', ["default_models[0].quant", "length >= 1"]),
        ('[[default_models]]\nmodel_id = "m"\nmemory_mb = 0', ["default_models[0].memory_mb", ">= 1"]),
        ('[[default_models]]\nmodel_id = "m"\n' * 2, ["default_models", "'m' is used twice"]),
        ("[admission]\nmax_per_caller = 1.5", ["admission.max_per_caller", "`int`"]),
        ("[prefix_cache]\nenabled = 1", ["prefix_cache.enabled", "`bool`"]),
        ("[prefix_cache]\nenable = true", ["prefix_cache.enable", "'enabled'"]),
    ],
)
def test_a_bound_that_makes_no_sense_is_refused(write, text, told):
    with pytest.raises(ConfigError) as refused:
        load_neuron(write(text, "neuron.toml"), {})
    for part in told:
        assert part in str(refused.value)


def test_what_a_model_may_do_is_read_and_has_defaults(write):
    text = "[admission]\nmax_running = 3\nmax_wait_s = 0\nmax_per_caller = 2\n[prefix_cache]\nenabled = false"
    config = load_neuron(write(text, "neuron.toml"), {})
    admission = config.admission
    assert (admission.max_running, admission.max_waiting) == (3, 32)
    assert (admission.max_wait_s, admission.max_per_caller) == (0, 2)
    assert not config.prefix_cache.enabled
    standard = NeuronConfig()
    assert (standard.admission.max_running, standard.admission.max_wait_s) == (8, 120)
    assert standard.prefix_cache.enabled


def test_a_misspelt_variable_is_refused_and_a_strangers_is_not():
    with pytest.raises(ConfigError, match=r"CORTEX_GATEWAY__LISEN: .*'listen'"):
        load_gateway(None, {"CORTEX_GATEWAY__LISEN": "x"})
    load_gateway(None, {"CORTEX_ENDPOINT": "x", "CORTEX_API_KEY": "k", "CORTEX_SOMETHING": "1"})


def test_a_variable_of_the_wrong_type_is_refused():
    with pytest.raises(ConfigError, match=r"gateway\.body_limit_mb: expected `int`"):
        load_gateway(None, {"CORTEX_GATEWAY__BODY_LIMIT_MB": "lots"})


def test_the_catalogue_stands_beside_the_config_or_where_it_says(write):
    path = write(GOOD)
    assert load_models(load_gateway(path, {}), path) == ModelsConfig()
    write('[[models]]\nid = "m"\n[aliases]\na = "m"', "models.toml")
    models = load_models(load_gateway(path, {}), path)
    assert [model.id for model in models.models] == ["m"]
    assert models.aliases == {"a": "m"}
    write('[[models]]\nid = "n"', "other.toml")
    path = write('models_config = "other.toml"\n' + GOOD)
    assert [model.id for model in load_models(load_gateway(path, {}), path).models] == ["n"]


def test_a_named_catalogue_that_is_missing_or_wrong_never_becomes_an_empty_one(write):
    path = write('models_config = "absent.toml"\n' + GOOD)
    with pytest.raises(ConfigError, match=r"absent\.toml: there is no such file"):
        load_models(load_gateway(path, {}), path)
    write('[[models]]\nid = "m"\nresidency_priority = 3', "models.toml")
    path = write(GOOD)
    with pytest.raises(ConfigError, match=r"models\.residency_priority: .*write priority"):
        load_models(load_gateway(path, {}), path)


def test_all_keys_are_paths_that_load_knows():
    assert {"gateway.listen", "neurons.endpoint", "models_config"} <= set(all_keys(GatewayConfig))
    assert {"harness.torch.threads", "default_models.source"} <= set(all_keys(NeuronConfig))


@given(st.text(max_size=200))
def test_any_text_loads_or_is_refused(tmp_path_factory, text):
    path = tmp_path_factory.getbasetemp() / "any.toml"
    path.write_text(text, encoding="utf-8", errors="replace")
    try:
        assert isinstance(load_gateway(path, {}), GatewayConfig)
    except ConfigError as error:
        assert "\n" not in str(error)
