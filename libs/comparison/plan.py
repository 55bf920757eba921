"""What an evaluation is to do, what of it is done, and the files of its folder.

evaluation.json says all that changes a number. Scores lie in scored/, a file for every video and seed that is whole or
not there: the same command goes on after a kill, and other settings are refused.
"""

import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from itertools import chain
from pathlib import Path

import cv2
import torch

from common.command_line import require
from common.errors import InputError
from common.files import check_writable, note_own, refuse_foreign, write_json
from common.hardware import accelerator_or_cpu
from common.weights import fingerprint
from dataset.folders import list_folders, size_and_time
from libs.comparison.clips import CLIPS
from libs.comparison.methods import TRUTH, list_methods
from libs.comparison.page import PAGE
from libs.comparison.protocols import choose_protocol, describe, follows_seed, size_text
from libs.evaluation.networks import SOURCES

FPS = 24  # of clips to look at: folders of frames have no rate
SETTINGS, SCORED = "evaluation.json", "scored"
PACKAGES = ("diffusers", "transformers", "scikit-image", "pillow")  # that change a number, besides torch and OpenCV
TABLES = ("scores.csv", "means.csv", "comparisons.csv")
SCORE_WEIGHTS = ("i3d_weights", *SOURCES)
WEIGHTS = ("base_model_name_or_path", "vae_path", "pcm_weights", *SCORE_WEIGHTS)  # flags of files that change a score
WITHOUT_EFFECT = ("output_dir", "overwrite", "num_processes", "seeds")  # flags that change no score of a video and seed


@dataclass(frozen=True)
class Plan:
    args: object
    protocol: object
    folders: list  # of the videos, in order

    @classmethod
    def of(cls, args):
        """Raises InputError for what can be told wrong before a picture or a weight is read."""
        protocol = choose_protocol(args)
        folders = protocol.find(args)
        protocol.check(args, folders)
        return cls(args, protocol, folders)

    @property
    def size(self):
        """Such as "432x240", of all frames; None: their own."""
        return size_text(self.args.size)

    @cached_property
    def methods(self):
        return list_methods(self.args, self.protocol.has_truth)

    def varies(self, method):
        """Whether a method's scores of a video follow from the seed; those of others are computed with the first."""
        return method.kind == "weights" or follows_seed(self.protocol, self.args)

    @property
    def reference(self):
        """The name of the method that the others are compared with: of --compare_with the first, else of all."""
        real = [method for method in self.methods if method.name != TRUTH]
        compared = [method for method in real if method.kind == "weights"]
        return (compared if len(compared) > 1 else real)[0].name

    @property
    def seeds(self):
        return [self.args.seed + i for i in range(self.args.seeds)]

    @property
    def jobs(self):
        """(number of a video, seed), all of a video before the next."""
        return [(number, seed) for number in range(len(self.folders)) for seed in self.seeds]

    def describe_other_set(self):
        """A line where the videos cannot be those that published numbers are of; or nothing."""
        published, count = self.protocol.published, len(self.folders)
        if published in (None, count):
            return ""
        return f"{count} videos: published numbers are of {published}, and compare with those of no other set"

    def jobs_left(self):
        """[(number of a video, seed)] that are not scored; broken videos are tried again."""
        if self.args.overwrite:
            return self.jobs
        return [job for job in self.jobs if "rows" not in (self.read_part(*job) or ())]

    def read_part(self, number, seed):
        """What was scored of a video with a seed, or {"key": ..., "broken": why}.

        None where nothing is, where the video's files have changed, and where its pictures are missing.
        """
        path = self.part(number, seed)
        part = json.loads(path.read_bytes()) if path.is_file() else None
        if part is None or part["key"] != self.key(number):
            return None
        pictures = (self.sheet(number), self.output_dir / CLIPS / f"{self.folders[number].name}.json")
        seen = "broken" in part or seed != self.seeds[0] or all(picture.is_file() for picture in pictures)
        return part if seen else None

    def key(self, number):
        """A short hash of the names, sizes and times of the files that a video's scores follow from."""
        return short_hash(self.sources(number)) + (self.key_of_objects if self.protocol.drawn else "")

    def sources(self, number):
        """The folders that a video's pictures may lie in."""
        folder = self.folders[number]
        return [folder, *(Path(root, folder.name) for root in (self.args.masks, self.args.prior) if root)]

    @cached_property
    def key_of_objects(self):
        """`key` of the videos whose objects are pasted in, which are many."""
        masks = list_folders(self.args.masks)
        return short_hash([*masks, *(Path(self.args.frames, folder.name) for folder in masks)])

    @property
    def output_dir(self):
        return Path(self.args.output_dir)

    @property
    def scored_folder(self):
        return self.output_dir / SCORED

    def part(self, number, seed):
        return self.scored_folder / f"{number:05d}-{seed}.json"

    def sheet(self, number):
        return self.output_dir / f"{self.folders[number].name}.png"

    @property
    def written(self):
        """Names in the folder, of files and of folders."""
        return [SETTINGS, SCORED, CLIPS, PAGE, *TABLES, *(f"{folder.name}.png" for folder in self.folders)]

    def check_output_dir(self):
        """Raise InputError where the folder holds what is not to be replaced; nothing is written."""
        target = Path(os.path.realpath(self.output_dir))
        for source in chain.from_iterable(map(self.sources, range(len(self.folders)))):
            inside = target.is_relative_to(os.path.realpath(source))
            require(not inside, f"--output_dir {self.output_dir} is in {source}, where contact sheets would count as "
                    "frames: choose another")  # fmt: skip
        for root in () if self.args.videos else filter(None, (self.args.frames, self.args.masks)):
            among = target.is_relative_to(os.path.realpath(root))
            require(not among, f"--output_dir {self.output_dir} is in {root}, whose folders count as videos: choose "
                    "another, or name the videos with --videos")  # fmt: skip
        check_writable(self.output_dir, "--output_dir")
        refuse_foreign(self.output_dir, self.written, self.args.overwrite)
        if any(self.scored_folder.glob("*.json")) and not self.args.overwrite:
            try:
                earlier = dict(flatten(json.loads(Path(self.output_dir, SETTINGS).read_bytes())))
            except (FileNotFoundError, ValueError, AttributeError):  # nothing tells what was scored
                earlier = {}
            refuse_other_settings(earlier, self.content(), self.output_dir)

    def begin(self):
        """Note what will be written, and start anew where that is asked for."""
        if self.args.overwrite:
            shutil.rmtree(self.scored_folder, ignore_errors=True)
        self.scored_folder.mkdir(exist_ok=True)
        note_own(self.output_dir, dict.fromkeys(self.written, 1))
        for name in (*TABLES, PAGE):  # of an earlier state
            Path(self.output_dir, name).unlink(missing_ok=True)
        write_json(self.output_dir / SETTINGS, self.content())

    def end(self, left_out, scores):
        """Write down what was scored, and what was not.

        Args:
            left_out: {video: why}.
            scores: {name: Score} of the columns.
        """
        content = self.content()
        content["videos"] = [name for name in content["videos"] if name not in left_out]
        content["scores"] = {name: score._asdict() for name, score in scores.items()}
        write_json(self.output_dir / SETTINGS, {**content, "left_out": left_out})

    def content(self):
        """evaluation.json, but for what is known at the end only."""
        flags = {name: value for name, value in vars(self.args).items() if name not in WITHOUT_EFFECT}
        models = [method.path for method in self.methods if method.kind == "weights"]
        paths = [*models, *(flags[name] for name in WEIGHTS if flags[name] and (models or name in SCORE_WEIGHTS))]
        files = {path: fingerprint(files_of_weights(path)) for path in paths}
        device = str(accelerator_or_cpu())
        versions = {"torch": torch.__version__, "opencv": cv2.__version__, **{name: version(name) for name in PACKAGES}}
        names = [folder.name for folder in self.folders]
        content = {
            "protocol": describe(self.protocol, self.args),
            "methods": [method._asdict() for method in self.methods if method.name != TRUTH],
            "reference": self.reference,
            "videos": names,
            "seeds": self.seeds,
            "settings": {**flags, "found": names, "device": device, "versions": versions, "files": files},
            "fps": FPS,
        }
        return json.loads(json.dumps(content, default=str))


def short_hash(folders):
    """A hash of the names, sizes and times of all files in some folders."""
    files = [path for folder in folders for path in sorted(files_below(folder)) if path.is_file()]
    stats = [(str(path), *size_and_time(path)) for path in files]
    return hashlib.sha256(repr(stats).encode(errors="surrogateescape")).hexdigest()[:16]


def refuse_other_settings(earlier, asked, output_dir):
    """Raise InputError, naming the first difference, where a folder's evaluation was asked for something else.

    Args:
        earlier: its evaluation.json, flattened; {} where there is none that can be read.
        asked: what is asked for, as evaluation.json has it.
    """
    for name, value in flatten({name: asked[name] for name in ("protocol", "settings")}):
        found = earlier.get(name)
        if found != value:
            raise InputError(
                f"{output_dir} holds an evaluation with {name}={json.dumps(found)}, not {json.dumps(value)}: choose "
                "another --output_dir, or add --overwrite to score anew"
            )


def flatten(content, prefix=""):
    """Yield (name, value) of dictionaries in dictionaries, whose names are joined by dots."""
    for name, value in content.items():
        if isinstance(value, dict):
            yield from flatten(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def files_of_weights(path):
    """A file, or those of weights in a folder; none of what is a name on the Hub."""
    files = [Path(path)] if Path(path).is_file() else files_below(path)
    return sorted(file for file in files if file.suffix in (".safetensors", ".bin", ".pt", ".pth"))


def files_below(folder):
    """Paths of all files in a folder and the folders below it, links followed."""
    return [Path(top, name) for top, _, names in os.walk(folder, followlinks=True) for name in names]
