"""From the scores of videos to tables, differences with intervals, and words."""

import itertools

import numpy as np

from common.errors import InputError
from common.run_files import write_rows
from libs.comparison.methods import TRUTH
from libs.evaluation.intervals import compare_all
from libs.evaluation.metrics import SCORES, SET_SCORES, average, mean_of_numbers, table
from libs.evaluation.vfid import frechet_distance


class Results:
    """The scores of a plan that is done.

    Attributes: rows, {(method, seed, video): {"frames": n, score: value}} of the videos that all seeds have scored;
    features, {(method, seed): VFID's features of these}; left_out, {video: why}.
    """

    def __init__(self, plan):
        self.plan, self.rows, self.features, self.left_out = plan, {}, {}, {}
        for number, folder in enumerate(plan.folders):
            parts = {seed: plan.read_part(number, seed) for seed in plan.seeds}
            if None in parts.values():
                raise InputError(f"{folder.name} has changed while it was scored: run the same command again")
            broken = [part["broken"] for part in parts.values() if "broken" in part]
            if broken:
                self.left_out[folder.name] = broken[0]
                continue
            for method in plan.methods:
                for seed in plan.seeds:
                    part = parts[seed if plan.varies(method) else plan.seeds[0]]
                    self.rows[method.name, seed, folder.name] = part["rows"][method.name]
                    if method.name in part["features"]:
                        self.features.setdefault((method.name, seed), []).append(part["features"][method.name])
        if not self.rows:
            raise InputError(next(iter(self.left_out.values())))
        self.videos = [folder.name for folder in plan.folders if folder.name not in self.left_out]
        found = {name for row in self.rows.values() for name, value in row.items() if not np.isnan(value)}
        self.scores = {name: score for name, score in SCORES.items() if name in found}

    def means(self):
        """{method: {"frames": n, score: mean}}: over videos, then over seeds; VFID, and what --weights changes."""
        means = {}
        for method in self.plan.methods:
            by_seed = [self.of_seed(method.name, seed) for seed in self.plan.seeds]
            means[method.name] = {name: mean_of_numbers([row[name] for row in by_seed]) for name in by_seed[0]}
            means[method.name]["frames"] = by_seed[0]["frames"]
        compared = [method.name for method in self.plan.methods if method.kind == "weights"]
        if len(compared) > 1:
            before, after = means[self.plan.reference], means[compared[-1]]
            means["difference"] = {**{name: after[name] - before[name] for name in after}, "frames": after["frames"]}
        return means

    def of_seed(self, method, seed):
        """{"frames": n, score: mean}, see `average`, and VFID, where there are two videos or more."""
        means = average([self.of_video(method, seed, video) for video in self.videos])
        if len(self.features.get((method, seed), ())) > 1:
            means["vfid"] = frechet_distance(self.features[TRUTH, seed], self.features[method, seed])
        return means

    def of_video(self, method, seed, video):
        """{"frames": n, score: value} of the scores that anything has."""
        row = self.rows[method, seed, video]
        return {"frames": row["frames"], **{name: row[name] for name in self.scores}}

    def comparisons(self):
        """Rows of `compare_all`: every method beside the reference, best first for each score."""
        plan, rows = self.plan, []
        methods = {method.name: method for method in plan.methods if method.name not in (TRUTH, plan.reference)}
        reference = next(method for method in plan.methods if method.name == plan.reference)
        for name, method in methods.items():
            # Of two methods without noise a second seed says nothing.
            seeds = plan.seeds if plan.varies(method) or plan.varies(reference) else plan.seeds[:1]
            values = {(side, "", score): {(video, seed): self.rows[side, seed, video][score]
                                          for video in self.videos for seed in seeds}
                      for side in (name, plan.reference) for score in self.scores}  # fmt: skip
            rows += compare_all(values, plan.reference, [name], [""], self.scores)
        order, higher = list(self.scores), {name: score.higher_is_better for name, score in self.scores.items()}
        rows.sort(key=lambda row: (order.index(row["score"]), -row["mean"] if higher[row["score"]] else row["mean"]))
        return [{name: value for name, value in row.items() if name != "task"} for row in rows]

    def write(self):
        """The CSV files and evaluation.json; returns the lines to print."""
        folder, means, comparisons = self.plan.output_dir, self.means(), self.comparisons()
        videos = len(self.videos)
        order = itertools.product(self.videos, self.plan.seeds, (method.name for method in self.plan.methods))
        write_rows(
            folder / "scores.csv",
            [{"method": method, "seed": seed, "video": video, **self.of_video(method, seed, video)}
             for video, seed, method in order],
        )  # fmt: skip
        write_rows(folder / "means.csv", [{"method": name, "videos": videos, **row} for name, row in means.items()])
        write_rows(folder / "comparisons.csv", comparisons)
        of_set = {name: score for name, score in SET_SCORES.items() if name in next(iter(means.values()))}
        self.plan.end(self.left_out, self.scores | of_set)
        lines = table(means)
        if "vfid" in means[TRUTH if TRUTH in means else self.plan.reference]:
            lines.append(f"VFID is of {videos} videos: compare it with that of as many only")
        return lines + self.verdicts(comparisons)

    def verdicts(self, comparisons):
        """Lines: in words what each method is beside the reference, by the protocol's scores."""
        chosen = [row for row in comparisons if row["score"] in self.plan.protocol.verdicts and np.isfinite(row["low"])]
        if not chosen:
            return []
        width = max(len(row["method"]) for row in chosen)
        lines = [f"Beside {self.plan.reference}, with 95 % intervals over videos and seeds (one in twenty misses):"]
        for name in dict.fromkeys(row["score"] for row in chosen):
            rows = [row for row in chosen if row["score"] == name]
            score = self.scores[name]
            lines.append(f"{score.heading}, {rows[0]['baseline']:.{score.decimals}f}{score.unit} there")
            lines += [f"  {row['method']:<{width}}  {row['verdict']}" for row in rows]
        return lines

    def refuse_gaps(self):
        """Raise InputError, naming them, where videos were left out: the table is not the one that was asked for."""
        if self.left_out:
            name, why = next(iter(self.left_out.items()))
            more = f"; {', '.join(list(self.left_out)[1:])}" if len(self.left_out) > 1 else ""
            raise InputError(
                f"{len(self.left_out)} of {len(self.plan.folders)} videos left out: {name} ({why}){more}; mend them, "
                "and the same command scores what is missing"
            )
