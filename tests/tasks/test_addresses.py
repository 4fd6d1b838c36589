from pathlib import Path

import pytest

from tasks.artifacts import address


def test_a_report_is_found_below_the_folder_that_is_served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in the image: the server has /workspace, the run /app/workspace/demo, a link to it."""
    report = tmp_path / "workspace" / "demo" / "evaluate" / "demo-1" / "report.html"
    report.parent.mkdir(parents=True)
    report.touch()
    (tmp_path / "app").mkdir()
    (tmp_path / "app" / "workspace").symlink_to(tmp_path / "workspace")
    workspace = tmp_path / "app" / "workspace" / "demo"
    seen = workspace / "evaluate" / "demo-1" / "report.html"
    assert address(seen, workspace) is None
    monkeypatch.setenv("WAN_FILES_URL", "http://files/")
    assert address(seen, workspace) == "http://files/evaluate/demo-1/report.html"
    monkeypatch.setenv("WAN_FILES_ROOT", str(tmp_path / "workspace"))
    assert address(seen, workspace) == "http://files/demo/evaluate/demo-1/report.html"
    monkeypatch.setenv("WAN_FILES_ROOT", str(tmp_path / "elsewhere"))
    assert address(seen, workspace) is None
