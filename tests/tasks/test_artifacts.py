import base64
from pathlib import Path

from tasks.artifacts import dataset_card


def test_a_dataset_card_carries_its_pictures(tmp_path: Path) -> None:
    """Prefect's page cannot open files of the machine that worked."""
    for name in ("histograms.png", "contact_sheet.png"):
        (tmp_path / name).write_bytes(name.encode())
    (tmp_path / "card.md").write_text(
        "# cats\n\n![four plots](histograms.png)\n\n![12 clips](contact_sheet.png)\n\nEnd.\n"
    )
    page = dataset_card(tmp_path)
    for name in ("histograms.png", "contact_sheet.png"):
        assert f'src="data:image/png;base64,{base64.b64encode(name.encode()).decode()}"' in page
        assert f"({name})" not in page
    assert page.startswith("# cats\n") and page.endswith("End.\n")
