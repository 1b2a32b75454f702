"""The page that users look settings up on."""

from torchspec_lib.config.reference import page
from torchspec_lib.config.run import RunConfig
from torchspec_lib.config.settings import PROJECT_ROOT

PAGE = PROJECT_ROOT / "docs" / "configuration.md"


def rows() -> list[list[str]]:
    lines = [line for line in PAGE.read_text().splitlines() if line.startswith("| `")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


def test_the_page_of_settings_says_what_the_code_says():
    assert PAGE.read_text() == page(), "see its head for the command"


def test_every_setting_has_a_meaning_and_none_is_left_out():
    def count(model: type) -> int:
        kinds = [field.annotation for field in model.model_fields.values()]
        return sum(count(kind) if hasattr(kind, "model_fields") else 1 for kind in kinds)

    assert len(rows()) == count(RunConfig) > 80
    assert [row[0] for row in rows() if len(row) != 4 or not row[3]] == []
