"""What the project promises about its own files."""

import ast
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from pydantic import TypeAdapter

from wan_core import presets
from wan_core.config import PipelineConfig

ROOT = Path(__file__).parent.parent
PACKAGES = ("wan_core", "tasks", "flows")

# import-linter sees every part of Megatron as one package, `megatron`; these rules tell the parts apart.
# What may be imported: by which modules (or packages) alone.
ALLOWED = {
    "megatron.bridge.diffusion": (),
    "megatron.bridge": (
        "wan_core.checkpointing",
        "wan_core.convert",
        "wan_core.dataset",
        "wan_core.ema",
        "wan_core.lora",
        "wan_core.metrics_log",
        "wan_core.model.provider",
        "wan_core.recipes",
        "wan_core.runtime",
        "wan_core.stability",
        "wan_core.train",
        "wan_core.training",
        "wan_core.training_samples",
        "wan_core.validation",
    ),
    "megatron.core.parallel_state": ("wan_core.parallel",),
    "megatron.core.mpu": ("wan_core.parallel",),  # the same module by another name
    "megatron.energon": ("wan_core.data",),
    "megatron": (
        "wan_core.async_writer",
        "wan_core.checkpointing",
        "wan_core.convert",
        "wan_core.ema",
        "wan_core.fsdp",
        "wan_core.lora",
        "wan_core.model",
        "wan_core.parallel",
        "wan_core.runtime",
        "wan_core.step",
        "wan_core.training_samples",
    ),
    "transformer_engine": ("wan_core.model", "wan_core.parallel", "wan_core.runtime"),
}


def below(name: str, parent: str) -> bool:
    return name == parent or name.startswith(parent + ".")


def modules() -> Iterator[tuple[str, Path]]:
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            yield ".".join(part for part in parts if part != "__init__"), path


def imports(source: str) -> Iterator[tuple[int, str]]:
    """Every absolute import, also those inside functions: line, dotted name (`from a import b` gives a.b)."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def forbidden_imports(module: str, source: str) -> list[str]:
    found = []
    for line, name in imports(source):
        rule = next((target for target in ALLOWED if below(name, target)), None)
        if rule and not any(below(module, owner) for owner in ALLOWED[rule]):
            found.append(f"line {line} of {module} imports {name}; {rule} is for {ALLOWED[rule] or 'nobody'}")
    return found


def test_each_part_of_megatron_has_its_owners() -> None:
    assert [text for module, path in modules() for text in forbidden_imports(module, path.read_text("utf-8"))] == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("wan_core.train", "from megatron.bridge.diffusion import models"),
        ("wan_core.train", "import megatron.bridge.diffusion.recipes.wan"),
        ("wan_core.encode.vae", "def f():\n    from megatron.bridge import AutoBridge"),
        ("wan_core.model.layer", "from megatron.core import parallel_state as mpu"),
        ("wan_core.model.layer", "from megatron.energon import Sample"),
        ("wan_core.data.loader", "from megatron.core import mpu"),
        ("flows.pretrain", "import megatron.core"),
    ],
)
def test_the_check_sees_a_wrong_import(module: str, source: str) -> None:
    assert len(forbidden_imports(module, source)) == 1


def test_every_folder_with_code_is_a_package() -> None:
    """Without an `__init__.py`, import-linter and mypy pass over a folder, and say nothing."""
    folders = {path.parent for _, path in modules()}
    assert [str(folder.relative_to(ROOT)) for folder in sorted(folders) if not (folder / "__init__.py").is_file()] == []


@pytest.mark.parametrize("name", ["requirements.lock", "infra/requirements-gpu.lock"])
def test_locks_agree_with_pyproject_and_name_no_index(name: str) -> None:
    """infra/pin.sh writes both; they part when one is edited by hand."""
    text = (ROOT / name).read_text()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    locked = re.findall(r"^([\w.-]+==[^\s;]+)", text, re.MULTILINE)
    pins = set(project["tool"]["uv"]["constraint-dependencies"])
    assert len(locked) > 100
    assert [pin for pin in locked if pin not in pins] == []
    assert text.count("--hash=sha256:") >= len(locked)
    assert "://" not in text and "--index" not in text


def test_every_dependency_is_locked() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    wanted = [*project["project"]["dependencies"], *project["dependency-groups"]["dev"]]
    names = {re.match(r"[\w.-]+", text)[0].lower().replace("_", "-") for text in wanted}  # type: ignore[index]
    locked = set(re.findall(r"^([\w.-]+)==", (ROOT / "requirements.lock").read_text(), re.MULTILINE))
    assert names <= locked, f"not in requirements.lock: {sorted(names - locked)}; run infra/pin.sh"


def test_the_demos_deployment_is_its_preset() -> None:
    """`prefect.yaml` cannot call Python, so it spells out `presets.wan_demo`."""
    items = yaml.safe_load((ROOT / "deployments" / "prefect.yaml").read_text("utf-8"))["deployments"]
    configs = {(item["entrypoint"], item["name"]): item["parameters"]["config"] for item in items}
    whole = configs["flows/end_to_end.py:end_to_end", "demo"]
    assert TypeAdapter(PipelineConfig).validate_python(whole) == presets.get("wan_demo")
    for stage in ("encode", "shard", "train", "sample", "evaluate"):
        assert configs[f"flows/stages.py:{stage}", "demo"] == whole[stage]


def test_links_between_documents_lead_somewhere() -> None:
    pages = [path for path in (*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"))]
    links = [(page, link) for page in pages for link in re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8"))]
    local = [(page, link) for page, link in links if "://" not in link]
    assert len(local) > 30
    assert [f"{page.name}: {link}" for page, link in local if not (page.parent / link).exists()] == []


def test_ray_makes_no_environment_of_its_own() -> None:
    """Which it does, for every worker, of what `uv run` starts."""
    program = (
        "import tasks\nfrom ray._private import ray_constants as ray\nassert not ray.RAY_ENABLE_UV_RUN_RUNTIME_ENV"
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=environment, check=True)
