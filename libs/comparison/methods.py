"""What fills holes in an evaluation: converted folders, the plain ways, and frames that another method has made."""

from typing import NamedTuple

from tqdm import tqdm

from libs.evaluation.baselines import BASELINES
from libs.inference.load import load_pipeline
from libs.inference.prior import ON_THE_SPOT, make_prior

TRUTH = "the video itself"


class Method(NamedTuple):
    name: str
    kind: str  # "truth", "baseline", "prior" or "weights", the only one whose results follow from the seed's noise
    path: str | None = None

    def load(self, args):
        """A function of (clip, prior (f, h, w, 3) or None, noise's seed) that returns whole frames (f, h, w, 3)."""
        if self.kind == "truth":
            return lambda clip, prior, seed: clip.truth
        if self.kind == "prior":
            return lambda clip, prior, seed: prior
        if self.kind == "baseline":
            return lambda clip, prior, seed: BASELINES[self.name](clip.shown, clip.holes)
        return fill_with(args, self.path)


def fill_with(args, weights):
    """What Method.load returns, of the converted folder `weights`."""
    pipeline, prompt_embeds, _ = load_pipeline(args, weights)

    def fill(clip, prior, seed):
        prior = make_prior(args.prior, clip.shown, clip.holes) if prior is None else prior
        work = pipeline.count_work(len(clip.shown), prior is not None)
        with tqdm(total=work, leave=False, unit="frame", disable=True if args.num_processes > 1 else None) as bar:
            return pipeline.fill(clip.shown, clip.holes, prompt_embeds, seed, prior, progress=bar.update)

    return fill


def list_methods(args, has_truth):
    """The methods in the order of the table: models come last, and --weights after those it is compared with."""
    methods = [Method(TRUTH, "truth")] if has_truth else []
    methods += [Method(name, "baseline") for name in args.baselines]
    if args.prior not in ON_THE_SPOT:
        methods.append(Method(f"prior {args.prior}", "prior", args.prior))
    if not args.no_model:
        methods += [Method(f"baseline {folder}", "weights", folder) for folder in dict.fromkeys(args.compare_with)]
        methods.append(Method(args.weights, "weights", args.weights))
    return methods
