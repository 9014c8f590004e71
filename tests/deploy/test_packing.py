"""The files of deploy/ and .github/, checked by the linters and schemas of their programs, where installed."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import ROOT
from packaging.requirements import Requirement

pytestmark = pytest.mark.slow

DOCKERFILE = (ROOT / "deploy" / "Dockerfile").read_text()
BIN = Path(sys.executable).parent
UNIT = ROOT / "deploy" / "stable-diffusion-server.service"
SCHEMAS = [
    ("vendor.compose-spec", "deploy/compose.yaml"),
    ("vendor.github-workflows", ".github/workflows/check.yml"),
    ("vendor.github-issue-forms", ".github/ISSUE_TEMPLATE/bug.yml"),
    ("vendor.github-issue-forms", ".github/ISSUE_TEMPLATE/feature.yml"),
]


def ran(*command: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(  # noqa: S603  # linters, on our own files
        [str(part) for part in command], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )


def test_the_dockerfile_is_what_its_linter_wants() -> None:
    """Hadolint reports nothing."""
    done = ran(BIN / "hadolint", "deploy/Dockerfile")
    assert (done.returncode, done.stdout) == (0, "")


def test_all_that_the_dockerfile_copies_is_there_and_sent_to_the_builder() -> None:
    """No COPY of a file that is missing, or that .dockerignore excludes."""
    ignore = (ROOT / ".dockerignore").read_text().split("\n")
    sent = {path for pattern in ignore if pattern.startswith("!/") for path in ROOT.glob(pattern[2:])}
    copied = [
        name
        for line in re.sub(r"\\\n", "", DOCKERFILE).splitlines()
        if line.startswith("COPY ") and "--from" not in line
        for name in line.split()[1:-1]
    ]
    assert len(copied) > 8
    for name in copied:
        path = ROOT / name
        assert path.exists(), name
        assert {path, *path.parents} & sent or any(path in one.parents for one in sent), name


def test_the_image_runs_as_a_user_and_asks_for_its_health() -> None:
    """Not root, with a HEALTHCHECK, and with volumes for state and weights."""
    assert re.findall(r"^USER (\S+)", DOCKERFILE, re.M) == ["10001"]
    assert "HEALTHCHECK" in DOCKERFILE
    assert "/healthz" in DOCKERFILE
    assert 'VOLUME ["/data", "/models"]' in DOCKERFILE


def test_the_image_is_built_of_the_locked_versions() -> None:
    """What the Dockerfile installs from requirements.lock pins every requirement, torch too."""
    (command,) = re.findall(r"^RUN (grep .*?) > versions\.txt", DOCKERFILE, re.M)
    pinned = dict(line.split("==") for line in ran("/bin/sh", "-c", command).stdout.splitlines())
    files = [ROOT / f"{name}-requirements.txt" for name in ("server", "upscaler", "vision", "credentials", "ui")]
    wanted = [line for file in files for line in file.read_text().splitlines() if line and not line.startswith("#")]
    assert len(wanted) > 20
    for requirement in map(Requirement, wanted):
        name = requirement.name.lower().replace("_", "-")
        assert requirement.specifier.contains(pinned[name]), name


@pytest.mark.parametrize(("schema", "file"), SCHEMAS, ids=lambda value: str(value))
def test_a_file_for_another_program_fits_its_schema(schema: str, file: str) -> None:
    """Compose, workflows and issue forms."""
    done = ran(sys.executable, "-m", "check_jsonschema", "--builtin-schema", schema, file)
    assert done.returncode == 0, done.stdout


def test_pre_commit_calls_targets_that_the_makefile_has() -> None:
    """The configuration is valid, and each hook is a `make` target."""
    assert ran(sys.executable, "-m", "pre_commit", "validate-config").returncode == 0
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M))
    assert {hook["entry"].removeprefix("make ") for hook in hooks} <= targets


def test_the_workflow_calls_what_is_there() -> None:
    """`.ci/run`, and targets of the Makefile."""
    jobs = yaml.safe_load((ROOT / ".github" / "workflows" / "check.yml").read_text())["jobs"]
    steps = [step["run"] for job in jobs.values() for step in job["steps"] if "run" in step]
    assert ".ci/run" in steps
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M))
    assert {step.removeprefix("make ") for step in steps if step.startswith("make ")} <= targets


def test_the_unit_is_what_systemd_wants(tmp_path: Path) -> None:
    """`systemd-analyze verify` reports nothing, with an existing interpreter in place of the installed one."""
    analyze = shutil.which("systemd-analyze") or pytest.skip("systemd is not here")
    unit = tmp_path / UNIT.name
    unit.write_text(UNIT.read_text().replace("/opt/stable-diffusion-server/bin/python", sys.executable))
    done = ran(analyze, "verify", unit)
    assert (done.returncode, done.stderr) == (0, "")
    assert "stable_diffusion_server.watchdog" in UNIT.read_text()


def test_the_kubernetes_example_is_whole_and_asks_for_what_there_is() -> None:
    """Its Serve configuration has only options of `Scale`, pods drain longer than jobs run, mounts have volumes."""
    claim, service = yaml.safe_load_all((ROOT / "deploy" / "kuberay.yaml").read_text())
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    serve = yaml.safe_load(service["spec"]["serveConfigV2"])
    (application,) = serve["applications"]
    source = (ROOT / "deploy" / "ray_serve.py").read_text()
    options = set(re.findall(r"^    (\w+): (?:int|float) = Field", source, re.M))
    assert set(application["args"]) <= options
    assert application["import_path"] == "deploy.ray_serve:application"
    cluster = service["spec"]["rayClusterConfig"]
    assert f"ray[serve]=={cluster['rayVersion']}" in (ROOT / "deploy" / "ray-requirements.txt").read_text()
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        assert pod["terminationGracePeriodSeconds"] > application["args"]["drain_seconds"]
        (container,) = pod["containers"]
        assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
        if group is not cluster["headGroupSpec"]:
            assert container["resources"]["limits"]["nvidia.com/gpu"] == str(application["args"]["gpus"])
            assert group["maxReplicas"] == application["args"]["most"]
