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


def make_page(template, gather, folder, output, whose, advice):
    """Write the page of a folder to `output`, and note it as ours.

    Args:
        gather: a function of the folder that returns what the template needs, {name: value}.
        whose: what the folder's files should be, such as "a training run's".
        advice: what to do where the page cannot be written.

    Raises: InputError for a folder whose files have been changed, and where the page cannot be written.
    """
    try:
        page = render(template, gather(folder))
    except InputError:
        raise
    except (LookupError, ValueError, TypeError, AttributeError) as error:
        raise InputError(f"{folder} holds files that are not {whose} any more ({error!r})") from None
    try:
        with written_whole(output) as partial:
            partial.write_text(page, encoding="utf-8", errors="backslashreplace")
        note_own(output.parent, {output.name: 1})
    except OSError as error:
        raise InputError(f"{output} cannot be written ({error.strerror}): {advice}") from None
