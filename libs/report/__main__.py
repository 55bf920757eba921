"""One self-contained HTML page of a run: curves, scores, samples through time, checkpoints, settings.

python -m libs.report finetune-stage1
"""

from pathlib import Path

from common.command_line import Parser
from common.errors import one_line_errors
from common.files import refuse_foreign
from common.pages import make_page
from libs.report.gather import gather


def write_report(run_dir, output=None, overwrite=False):
    """Write the page of a run's folder (report.html in it, unless `output` names a file or a folder); returns its path.

    Raises: InputError for a folder that is not a run's, and for a file at `output` that is the user's own, unless told
    to `overwrite` it.
    """
    run_dir = Path(run_dir)
    output = Path(output) if output else run_dir / "report.html"
    output = output / "report.html" if output.is_dir() else output
    refuse_foreign(output.parent, [output.name], overwrite, "--output")
    template, advice = Path(__file__).with_name("page.html"), "choose another place with --output"
    make_page(template, gather, run_dir, output, "a training run's", advice)
    return output


@one_line_errors
def main(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("run_dir", help="a run's output folder, such as finetune-stage1")
    parser.add_argument("--output", metavar="PATH", help="file, or folder for report.html (default: the run's)")
    parser.add_argument("--overwrite", action="store_true", help="replace a file that no earlier report made")
    print(write_report(**vars(parser.parse_args(argv))))


if __name__ == "__main__":
    main()
