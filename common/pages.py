"""Pages of HTML that open without a server: one file each, in one style (page.css) that follows the reader's theme."""

from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from common.errors import InputError
from common.files import note_own, written_whole


def render(template, values):
    """The page that a template makes of {name: value}, escaped; it may include page.css and files beside itself."""
    environment = Environment(
        loader=FileSystemLoader([template.parent, Path(__file__).parent]), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    return environment.get_template(template.name).render(values)


def save_page(page, output, advice):
    """Write a page to `output` and note it as ours; raises InputError, with the advice, where that cannot be."""
    try:
        with written_whole(output) as partial:
            partial.write_text(page, encoding="utf-8", errors="backslashreplace")
        note_own(output.parent, {output.name: 1})
    except OSError as error:
        raise InputError(f"{output} cannot be written ({error.strerror}): {advice}") from None
