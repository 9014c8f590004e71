"""Settings: defaults, misspellings, secrets."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from stable_diffusion_server.app import create_app
from stable_diffusion_server.cli import main
from stable_diffusion_server.settings import Settings
from stable_diffusion_server.settings.loader import RENAMED, SettingsError, describe_settings, read_settings
from stable_diffusion_server.storage.factory import StorageOptions, aws_credentials

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An environment and a folder in which nothing is set."""
    for name in Settings.model_fields:
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.chdir(tmp_path)


def test_nothing_has_to_be_set() -> None:
    """The defaults serve this machine only, with the embedded models and a local folder."""
    settings = read_settings()
    assert (settings.host, settings.port, settings.storage_provider) == ("127.0.0.1", 8000, "local")
    assert not settings.allow_anonymous
    assert settings.bucket_path == "static/uploads"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("PORT", "eighty"),
        ("PORT", "65536"),
        ("QUEUE_LIMIT", "0"),
        ("STORAGE_PROVIDER", "tape"),
        ("DEVICE", "quantum"),
        ("WARMUP_SIZES", "1024"),
        ("WARMUP_SIZES", "512x512,0x64"),
        ("WARMUP_SIZES", "512X512"),
        ("ALLOW_ANONYMOUS", "maybe"),
        ("PUBLIC_BASE_URL", "ftp://pictures.example"),
        ("PUBLIC_BASE_URL", "https://"),
        ("CORS_ORIGINS", "https://app.example/path"),
        ("CORS_ORIGINS", "*"),
        ("MAX_GUIDANCE", "nan"),
        ("LOG_LEVEL", "loud"),
        ("HOST", ""),
        ("ALLOWED_HOSTS", "*"),
        ("ALLOWED_HOSTS", "https://draw.example.com"),
        ("ALLOWED_HOSTS", "bücher.example"),
        ("BUCKET_PATH", "../x"),
        ("BUCKET_PATH", "a//b"),
        ("PUBLIC_BASE_URL", "https://a b"),
        ("PUBLIC_BASE_URL", "https://user:pw@pictures.example"),
        ("PUBLIC_BASE_URL", "https://pictures.example:port"),
        ("API_KEYS", "schlüssel"),
        ("API_KEYS", "two words"),
        ("MAX_SIDE", "16384"),
        ("MAX_PROMPT_CHARACTERS", "32001"),
        ("EXTRA_IMAGE_FORMATS", "gif,psd"),
        ("WEBHOOK_SECRET", "whsec_abc"),
        ("WEBHOOK_SECRET", "whsec_"),
        ("WEBHOOK_SECRET", "whsec_not base64!"),
        ("WEBHOOK_SECRET", "  "),
        ("WEBHOOK_SECRET", "\udcff is no UTF-8"),
    ],
)
def test_an_invalid_value_stops_the_start_in_one_sentence(
    name: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One line that names the setting."""
    monkeypatch.setenv(name, value)
    with pytest.raises(SettingsError) as refused:
        read_settings()
    assert str(refused.value).startswith(name)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("API_KEY", "API_KEYS"),
        ("BUKET_PATH", "BUCKET_PATH"),
        ("ALOW_ANONYMOUS", "ALLOW_ANONYMOUS"),
        ("QUEUE_LIMTI", "QUEUE_LIMIT"),
        ("MAX_SIDES", "MAX_SIDE"),
        ("Data_dri", "DATA_DIR"),
    ],
)
def test_a_misspelt_name_stops_the_start(name: str, meant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A key that protects nothing because of a missing letter is worse than a failed start."""
    monkeypatch.setenv(name, "1")
    with pytest.raises(SettingsError, match=f"{name} is not a setting; {meant}"):
        read_settings()


@pytest.mark.parametrize(("old", "new"), RENAMED.items())
def test_an_old_name_stops_the_start_and_the_sentence_has_the_new_one(
    old: str, new: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A renamed setting would otherwise be ignored. The new name is a setting, the old one is not."""
    assert new.lower() in Settings.model_fields
    assert old.lower() not in Settings.model_fields
    monkeypatch.setenv(old, "1")
    with pytest.raises(SettingsError, match=f"^{old} is now called {new}: rename it.$"):
        read_settings()


def test_an_old_name_in_the_env_file_stops_the_start(tmp_path: Path) -> None:
    """In upper and lower case, as settings are read."""
    (tmp_path / ".env").write_text("Stop_Seconds=5\n")
    with pytest.raises(SettingsError, match="SHUTDOWN_GRACE_SECONDS"):
        read_settings()


def test_a_misspelt_name_in_the_env_file_is_found_too(tmp_path: Path) -> None:
    """`.env` is read and checked for misspellings, and may hold other programs' variables."""
    (tmp_path / ".env").write_text("AWS_ACCESS_KEY_ID=x\nPORT=8001\n")
    assert read_settings().port == 8001
    (tmp_path / ".env").write_text("BUCKET_PAHT=x\n")
    with pytest.raises(SettingsError, match="BUCKET_PATH"):
        read_settings()


@pytest.mark.parametrize(
    "name",
    [
        *("HOSTNAME", "PORTS", "EDITOR", "AWS_ACCESS_KEY_ID", "AWS_ACCESS_KEY", "DEVICES_LIST", "UI"),
        *("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_HEADERS"),
    ],
)
def test_variables_of_other_programs_are_ignored(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only a single typing error in one of our names stops the start."""
    monkeypatch.setenv(name, "1")
    read_settings()


@given(st.sampled_from([name for name in Settings.model_fields if len(name) > 6]), st.data())
def test_every_single_slip_is_recognised(name: str, data: st.DataObject) -> None:
    """A letter missing, doubled or replaced: the error suggests a setting."""
    from stable_diffusion_server.settings.loader import _misspelt

    i = data.draw(st.integers(0, len(name) - 1))
    slip = data.draw(
        st.sampled_from(
            [name[:i] + name[i + 1 :], name[:i] + name[i] * 2 + name[i + 1 :], name[:i] + "z" + name[i + 1 :]]
        )
    )
    assume(slip not in Settings.model_fields)
    assert _misspelt(slip, set(Settings.model_fields)) is not None


def test_a_secret_never_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither in the repr of the settings, nor in the error for another setting."""
    monkeypatch.setenv("API_KEYS", "hunter2,swordfish")
    assert "hunter2" not in repr(read_settings())
    monkeypatch.setenv("PORT", "none")
    with pytest.raises(SettingsError) as refused:
        read_settings()
    assert "hunter2" not in str(refused.value)
    assert refused.value.__cause__ is None


@pytest.mark.parametrize(("bucket", "data"), [("a", "a"), ("a", "a/b"), ("a/b", "a"), (".", "data")])
def test_bucket_and_state_may_not_contain_one_another(bucket: str, data: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """State inside the bucket would be served to everyone."""
    monkeypatch.setenv("LOCAL_BUCKET_DIR", bucket)
    monkeypatch.setenv("DATA_DIR", data)
    with pytest.raises(SettingsError, match="must not contain one another"):
        read_settings()


def test_sizes_to_warm_are_read_as_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Width first; blanks are ignored."""
    assert read_settings().warmup_sizes_in_pixels() == []
    monkeypatch.setenv("WARMUP_SIZES", "1024x768, 512x512")
    assert read_settings().warmup_sizes_in_pixels() == [(1024, 768), (512, 512)]


@pytest.mark.parametrize("url", ["https://pictures.example", "http://[::1]:9000", "https://a.example:444/some/path"])
def test_an_ordinary_base_url_is_taken_as_it_is(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a port, an address in brackets or a path."""
    monkeypatch.setenv("PUBLIC_BASE_URL", url)
    assert read_settings().public_base_url == url


def test_a_base_url_without_a_scheme_is_https(monkeypatch: pytest.MonkeyPatch) -> None:
    """The seed writes PUBLIC_BASE_URL=your-domain.com."""
    monkeypatch.setenv("PUBLIC_BASE_URL", "your-domain.com/")
    assert read_settings().public_base_url == "https://your-domain.com"


def test_the_page_of_settings_is_up_to_date() -> None:
    """docs/settings.md equals the output of `python -m stable_diffusion_server settings`."""
    assert describe_settings() in (ROOT / "docs" / "settings.md").read_text()


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        (
            "TEXT_TO_IMAGE_MODEL",
            "dalle",
            "TEXT_TO_IMAGE_MODEL 'dalle' is not one of embedded-flux, embedded-sdxl, flux, sdxl.",
        ),
        (
            "MODEL_ALIASES",
            "dall-e-3=dall-e",
            "MODEL_ALIASES 'dall-e-3=dall-e' names a model other than embedded-flux, embedded-sdxl, flux, sdxl.",
        ),
    ],
)
def test_a_model_that_is_not_in_the_catalogue_stops_the_start(
    name: str, value: str, sentence: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command exits with 2 and one sentence, before anything is loaded."""
    monkeypatch.setenv(name, value)
    with pytest.raises(SettingsError, match=f"^{re.escape(sentence)}$"):
        create_app(read_settings())
    with pytest.raises(SystemExit) as ended:
        main(["models"])
    assert ended.value.code == 2
    assert capsys.readouterr().err == f"{sentence}\n"


def test_the_table_holds_every_setting_once() -> None:
    """The groups are listed beside the class that inherits from them."""
    rows = re.findall(r"^\| `([A-Z0-9_]+)` \|", describe_settings(), re.MULTILINE)
    assert sorted(rows) == sorted(name.upper() for name in Settings.model_fields)


def test_no_variable_of_the_tests_environment_is_taken_for_a_slip() -> None:
    """The check accepts the environment it runs in."""
    assert os.environ
    read_settings()


STORE = {"STORAGE_PROVIDER": "r2", "BUCKET_NAME": "pictures", "R2_ENDPOINT_URL": "https://r2.example"}


@pytest.mark.parametrize(
    ("variables", "sentence"),
    [
        ({"STORAGE_PROVIDER": "r2"}, "BUCKET_NAME is needed"),
        ({"STORAGE_PROVIDER": "gcs"}, "BUCKET_NAME is needed"),
        ({"STORAGE_PROVIDER": "r2", "BUCKET_NAME": "pictures"}, "R2_ENDPOINT_URL is needed"),
        ({"STORAGE_PROVIDER": "tape"}, "STORAGE_PROVIDER"),
        ({"R2_ENDPOINT_URL": "account.r2.cloudflarestorage.com"}, "R2_ENDPOINT_URL is not an http"),
        ({"R2_ENDPOINT_URL": "https://key:secret@r2.example"}, "must not hold credentials"),
        *(
            ({**STORE, "R2_ENDPOINT_URL": url}, "R2_ENDPOINT_URL has a path: give https://r2.example alone")
            for url in ("https://r2.example/pictures", "https://r2.example/pictures/", "https://r2.example//a/b")
        ),
        ({"R2_ENDPOINT_URL": "https://r2.example/pictures"}, "R2_ENDPOINT_URL has a path"),
        ({**STORE, "R2_ENDPOINT_URL": "https://pictures.a.r2.cloudflarestorage.com"}, "begins with the bucket's name"),
        ({**STORE, "R2_ENDPOINT_URL": "https://pictures.s3.eu-west-1.amazonaws.com"}, "R2_ENDPOINT_URL begins with"),
        (
            {**STORE, "BUCKET_NAME": "s3://pictures"},
            "BUCKET_NAME 's3://pictures' is no name .* give pictures alone",
        ),
        ({**STORE, "BUCKET_NAME": "s3://pictures/"}, "BUCKET_NAME .* give pictures alone"),
        ({**STORE, "BUCKET_NAME": "r2://pictures/a/b"}, "BUCKET_NAME .* give pictures alone, and a/b as BUCKET_PATH"),
        ({"STORAGE_PROVIDER": "gcs", "BUCKET_NAME": "gs://pictures"}, "BUCKET_NAME .* give pictures alone"),
        ({**STORE, "BUCKET_NAME": "pictures/static"}, "BUCKET_NAME .* give pictures alone, and static as BUCKET_PATH"),
        ({**STORE, "BUCKET_NAME": "https://pictures.s3.amazonaws.com"}, "BUCKET_NAME .* give the name alone"),
        ({**STORE, "BUCKET_NAME": "my pictures"}, "BUCKET_NAME .* letters, digits"),
        ({**STORE, "BUCKET_NAME": "写真"}, "BUCKET_NAME .* letters, digits"),
        ({**STORE, "SIGNED_URL_ENDPOINT": "https://cdn.example"}, "SIGNED_URL_ENDPOINT needs SIGNED_URL_SECONDS"),
        ({"SIGNED_URL_ENDPOINT": "https://cdn.example/pictures"}, "SIGNED_URL_ENDPOINT has a path"),
        ({"SIGNED_URL_ENDPOINT": "cdn.example"}, "SIGNED_URL_ENDPOINT is not an http"),
    ],
)
def test_a_bucket_is_described_in_full_or_not_at_all(
    variables: dict[str, str], sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A missing setting of a provider stops the start, with its name."""
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SettingsError, match=sentence) as refused:
        read_settings()
    assert "secret@" not in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "variables",
    [
        {"R2_ENDPOINT_URL": "https://r2.example/"},
        {"R2_ENDPOINT_URL": "https://a.supabase.co/storage/v1/s3"},
        {"R2_ENDPOINT_URL": "https://pictures.example:9000"},
        {"R2_ENDPOINT_URL": "http://127.0.0.1:9000"},
        {"BUCKET_NAME": "static.example.com"},
        {"BUCKET_NAME": "arn:aws:s3:eu-west-1:123456789012:accesspoint/pictures"},
        {"SIGNED_URL_ENDPOINT": "https://cdn.example", "SIGNED_URL_SECONDS": "60"},
        {"BUCKET_NAME": "s3://unused", "STORAGE_PROVIDER": "local"},
    ],
)
def test_an_address_and_a_name_as_stores_have_them_are_taken(
    variables: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A service's own path, a MinIO behind the bucket's domain, access points."""
    for name, value in {**STORE, **variables}.items():
        monkeypatch.setenv(name, value)
    read_settings()


def test_every_storage_option_is_a_setting_of_that_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bucket options are read from the settings; secrets stay hidden."""
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "sesame")
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", "")
    options = read_settings()
    wanted = {name for name, member in vars(StorageOptions).items() if isinstance(member, property)}
    assert wanted <= type(options).model_fields.keys()
    assert aws_credentials(options)[1] == "sesame"
    assert options.google_application_credentials is None
    assert "sesame" not in repr(options)


@pytest.mark.parametrize(
    ("variables", "sentence"),
    [
        ({"API_KEYS": "ann:hunter2;rate=often"}, "API_KEYS has a rate at key 1"),
        ({"API_KEYS": "hunter2, hunter2"}, "API_KEYS holds two keys of one"),
        ({"API_KEYS": "hunter2;hunter3"}, "API_KEYS has options at key 1"),
        ({"API_KEYS_FILE": "nowhere"}, "API_KEYS_FILE cannot be read"),
        ({"RATE_LIMIT": "fast"}, "RATE_LIMIT 'fast' is not a rate"),
        ({"TRUSTED_PROXIES": "proxy.example"}, "TRUSTED_PROXIES 'proxy.example' is not an address"),
        ({"MODEL_ALIASES": "dall-e-3=Dall E"}, "MODEL_ALIASES 'dall-e-3=Dall E' is not like"),
    ],
)
def test_keys_and_limits_that_are_written_wrong_stop_the_start(
    variables: dict[str, str], sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One sentence that names the setting, and no part of a secret."""
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SettingsError, match=re.escape(sentence)) as refused:
        read_settings()
    assert "hunter" not in str(refused.value)


def test_shares_of_models_are_read_in_their_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Names with blanks and slashes too; without a share a model takes what is free."""
    monkeypatch.setenv("MODEL_SHARES", "flux=0.7, my folder/sdxl = .25,other")
    assert list(read_settings().shares().items()) == [("flux", 0.7), ("my folder/sdxl", 0.25), ("other", None)]
    monkeypatch.setenv("MODEL_SHARES", "flux=1.0")
    assert read_settings().shares() == {"flux": 1.0}
    monkeypatch.setenv("MODEL_SHARES", "")
    assert read_settings().shares() == {}


@pytest.mark.parametrize(
    "value",
    [
        "flux=0",
        "flux=1.5",
        "flux=-0.1",
        "flux=nan",
        "flux=1e-3",
        "flux=",
        "=0.5",
        "flux=0.7,sdxl=0.4",
        "a=0.1,a=0.2",
        "a=.5=.5",
    ],
)
def test_shares_that_are_none_are_refused(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not above 0, above 1, together above 1, no number, no name, one name twice."""
    monkeypatch.setenv("MODEL_SHARES", value)
    with pytest.raises(SettingsError, match="MODEL_SHARES"):
        read_settings()
