"""Settings: which of four places wins, what is refused and in which words."""

import json
from pathlib import Path

import pytest

from neurons.config import NeuronConfig, parse
from neurons.settings import SettingsError, default_of, flag_of, resolve, settings_in, settings_of, variable_of
from scripts.cli import main

NEEDED: dict[str, object] = {"wallet": "w", "hotkey": "h", "manifest": "m.toml", "data": "d"}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "orion.toml"
    path.write_text('wallet = "of-file"\nwallet-path = "keys"\nport = 1\nring = "1gb"\nuplink = "1mbit"\n')
    return path


def test_a_flag_comes_before_its_variable_that_before_the_file_that_before_the_default(file: Path) -> None:
    flags = {**NEEDED, "config": file, "uplink": "3mbit"}
    del flags["wallet"]
    resolved = resolve(NeuronConfig, flags, {"ORION_UPLINK": "2mbit", "ORION_RING": "2gb", "ORION_CACHE": "x"})
    config = resolved.build()
    assert (config.uplink, config.ring, config.port, config.netuid) == (3e6, 2 * 10**9, 1, 9)
    assert (config.wallet, config.wallet_path) == ("of-file", Path("keys"))
    origins = {one.name: one.origin for one in resolved.shown()}
    assert (origins["uplink"], origins["ring"], origins["netuid"]) == ("--uplink", "ORION_RING", "default")
    assert origins["port"] == origins["wallet_path"] == str(file)


def test_the_file_may_be_named_by_a_variable(file: Path) -> None:
    assert resolve(NeuronConfig, NEEDED, {"ORION_CONFIG": str(file)}).build().port == 1


def test_some_settings_follow_others_until_they_are_set() -> None:
    followed = resolve(NeuronConfig, {**NEEDED, "out": "there", "host": "1.2.3.4"}, {})
    config = followed.build()
    assert (config.checkpoints, config.announce, config.name) == ("there", "1.2.3.4", "h")
    assert {one.name: one.origin for one in followed.shown()}["checkpoints"] == "as out"
    assert resolve(NeuronConfig, {**NEEDED, "checkpoints": "s3://b/r"}, {}).build().checkpoints == "s3://b/r"


@pytest.mark.parametrize(
    ("flags", "environ", "message"),
    [
        ({}, {"ORION_PROT": "1"}, r"variable ORION_PROT is no setting: did you mean ORION_PORT\? Else unset it"),
        ({"port": "99999"}, {}, "^--port '99999' will not do: input should be less than or equal to 65535$"),
        ({}, {"ORION_PORT": "x"}, r"--port 'x' will not do: .*valid integer.* \(set by ORION_PORT\)"),
        (
            {},
            {"ORION_THREADS": "-1"},
            r"--threads '-1' will not do: .*equal to 0 \(set by ORION_THREADS",
        ),
        ({}, {"ORION_UPLINK": "fast"}, r"--uplink 'fast' is not of the form 200mbit .*\(set by ORION_UPLINK\)"),
        ({"loss": "200%"}, {}, "--loss '200%' is more than everything"),
    ],
)
def test_what_a_setting_cannot_be(flags: dict[str, object], environ: dict[str, str], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        resolve(NeuronConfig, {**NEEDED, **flags}, environ).build()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("wallt = 'x'", "'wallt' is no setting: did you mean 'wallet'?"),
        ("port = [1]", r"port is \[1\]; every setting is a text or a number"),
        ("port = true", "port is True"),
        ("port =", "is not TOML"),
        ("port = 70000", r"--port '70000' will not do: .* \(set by .*bad.toml\)"),
    ],
)
def test_what_a_file_cannot_say(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.toml"
    path.write_text(text)
    with pytest.raises(SettingsError, match=message):
        resolve(NeuronConfig, {**NEEDED, "config": path}, {}).build()
    with pytest.raises(SettingsError, match=r"none.toml cannot be read \(No such file"):
        resolve(NeuronConfig, {"config": tmp_path / "none.toml"}, {})


@pytest.mark.parametrize("name", NEEDED)
def test_what_is_needed_is_named_with_its_three_places(name: str) -> None:
    flags = {other: value for other, value in NEEDED.items() if other != name}
    words = f"{name} is not set: give {flag_of(name)}, {variable_of(name)} or {name} in the file"
    with pytest.raises(SettingsError, match=words):
        resolve(NeuronConfig, flags, {}).build()


def test_a_wrong_setting_is_a_usage_error_of_a_neuron(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse([], {"ORION_NETUDI": "1"}, program="x", description="x")
    assert caught.value.code == 2
    assert "did you mean ORION_NETUID?" in capsys.readouterr().err


def test_show_tells_every_value_and_its_origin(
    file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ORION_PORT", "7")
    flags = [f"--{name}={value}" for name, value in NEEDED.items()]
    assert main(["config", "show", "--config", str(file), *flags]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines if line.startswith("  port ")] == [["port", "7", "ORION_PORT"]]
    assert main(["config", "show", "--json", "--config", str(file), *flags]) == 0
    shown = {one["name"]: one for one in json.loads(capsys.readouterr().out)}
    assert list(shown) == list(settings_of(NeuronConfig))
    assert shown["ring"] == {"name": "ring", "group": "machine", "value": "1gb", "origin": str(file)}
    assert main(["config", "show"]) == 2
    assert capsys.readouterr().err.startswith("orion config: wallet is not set")


def test_the_template_is_a_file_that_only_needs_what_is_needed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["config", "template"]) == 0
    text = capsys.readouterr().out
    path = tmp_path / "orion.toml"
    path.write_text(text)
    resolved = resolve(NeuronConfig, {"config": path}, {})
    assert {name for name, origin in resolved.origins.items() if origin == str(path)} == set(NEEDED)
    # What is commented out says what holds without it.
    path.write_text("".join(line.removeprefix("# ") for line in text.splitlines(keepends=True) if " = " in line))
    whole = resolve(NeuronConfig, {"config": path}, {})
    assert set(whole.origins) == set(whole.values) == set(NeuronConfig.model_fields)


def test_local_nodes_are_not_set_by_their_user_s_variables() -> None:
    environ = {"ORION_PORT": "1", "ORION_CONFIG": "f", "ORION_CACHE": "c", "HOME": "h", "ORION_TYPO": "x"}
    assert settings_in(environ) == ["ORION_PORT", "ORION_CONFIG", "ORION_TYPO"]


def test_the_page_lists_every_setting_as_it_is() -> None:
    page = (Path(__file__).parents[2] / "docs" / "config.md").read_text()
    rows = [
        f"| `{flag_of(name)}` | `{variable_of(name)}` | {setting.help} "
        f"| {default_of(NeuronConfig, name).removeprefix('default: ')} |"
        for name, setting in settings_of(NeuronConfig).items()
    ]
    assert [line for line in page.splitlines() if line.startswith("| `--")] == rows
