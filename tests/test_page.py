"""The page of an evaluation: what is in it, and the clips that it plays."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from clips import moving_video, read_video

import libs.comparison.page
from common.errors import InputError
from common.run_files import write_rows
from libs.comparison import clips
from libs.comparison.clips import outline, save_clips, small_size
from libs.comparison.page import write_page

FOLDER = Path(libs.comparison.page.__file__).parent
VIDEOS = ["bear", "<b>&'\"", "caf\udce9"]
TEXTS = json.loads((FOLDER / "page_texts.json").read_bytes())
SCORES = {
    "psnr": {"heading": "PSNR", "unit": " dB", "decimals": 2, "higher_is_better": True},
    "warp": {"heading": "E_warp", "unit": "", "decimals": 2, "higher_is_better": False},
    "tc": {"heading": "TC", "unit": "", "decimals": 4, "higher_is_better": True},
}


@pytest.fixture
def evaluation(tmp_path):
    """The folder of an evaluation of three videos, two of them with clips, by two methods with two seeds."""
    methods = [{"name": "old <i>", "kind": "baseline", "path": None}, {"name": "new", "kind": "weights", "path": "w/n"}]
    for video in VIDEOS[:2]:
        frames, holes = moving_video(3, 32, 48)
        save_clips(tmp_path, video, frames, holes, {"old <i>": frames // 2, "new": 255 - frames}, 10.0)
    (tmp_path / f"{VIDEOS[2]}.png").write_bytes(b"a contact sheet")
    rows = [
        {"method": method["name"], "seed": seed, "video": video, "frames": 3, "psnr": 20 + 5 * n + 2 * seed + i,
         "warp": "inf" if i else 3, "tc": "nan"}
        for n, method in enumerate(methods) for seed in (0, 1) for i, video in enumerate(VIDEOS)
    ]  # fmt: skip
    write_rows(tmp_path / "scores.csv", rows)
    means = [("old <i>", 21, 3, "nan"), ("new", 26, "inf", "nan"), ("difference", 5, 0, "nan")]
    write_rows(tmp_path / "means.csv", [dict(zip(("method", *SCORES), mean, strict=True)) for mean in means])
    found = {"mean": 5, "low": 4.5, "high": 5.5, "wins": 3, "videos": 3, "seeds": 2}
    write_rows(tmp_path / "comparisons.csv", [
        {"method": "new", "score": "psnr", "baseline": 21, **found, "verdict": "better: +5.00 dB"},
        {"method": "new", "score": "warp", "baseline": 3, **found, "verdict": "no difference that 3 videos can show"},
    ])  # fmt: skip
    (tmp_path / "evaluation.json").write_text(json.dumps({
        "protocol": {"name": "pairs", "size": [48, 32]}, "methods": methods, "reference": "old <i>", "videos": VIDEOS,
        "left_out": {"goat": "</script> is damaged"}, "seeds": [0, 1], "scores": SCORES, "fps": 10.0,
    }))  # fmt: skip
    return tmp_path


def read_data(page):
    """What the page's script gets."""
    (content,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page)
    return json.loads(content)


def test_the_page_holds_everything_and_asks_for_nothing(evaluation, capsys):
    libs.comparison.page.main([str(evaluation)])
    assert capsys.readouterr().out.strip() == str(evaluation / "report.html")
    page = (evaluation / "report.html").read_text()
    assert "http" not in page and not re.search(r'(src|href)="', page) and "@import" not in page
    assert page.count('<script type="text/plain"') == 2 and 'id="clip-0"' in page and 'id="clip-1"' in page
    assert page.count("</script>") == 5 and "<b>&'" not in page and "old <i>" not in page  # names are no markup
    assert "old &lt;i&gt;" in page and "&lt;/script&gt; is damaged" in page and "[48, 32]" in page
    assert not re.search(r"\bnan\b|Infinity|NaN", re.sub(r"(?s)<script>.*?</script>", "", page))
    data = read_data(page)
    assert [video["name"] for video in data["videos"]] == VIDEOS
    assert [video["clip"] and video["clip"]["methods"] for video in data["videos"]] == [["old <i>", "new"]] * 2 + [None]
    assert [video["sheet"] for video in data["videos"]] == [None, None, "caf%E9.png"]
    assert (data["reference"], data["right"], data["score"]) == ("old <i>", "new", "psnr")
    assert data["values"] == {"psnr": [[21, 22, 23], [26, 27, 28]], "warp": [[3, None, None]] * 2}  # means of seeds
    assert write_page(evaluation).read_text() == page


def test_the_table_says_what_is_best_and_what_is_found(evaluation):
    page = write_page(evaluation).read_text()
    table = re.sub(r"<[^>]*>|\s+", " ", page.partition('<table id="table">')[2].partition("</table>")[0])
    assert re.sub(" +", " ", table).strip() == (
        "score old &lt;i&gt; new PSNR, dB ↑ 21.00 26.00 ▲ +5.00 [+4.50, +5.50] 3 of 3 "
        "E_warp ↓ 3.00 ∞ ○ +5.00 [+4.50, +5.50] 3 of 3"
    )
    assert "<b>26.00</b>" in page and "<b>3.00</b>" in page
    assert "better: +5.00 dB [+4.50, +5.50], better in 3 of 3 videos, seeds: 2" in page
    comparisons = evaluation / "comparisons.csv"
    comparisons.write_text(comparisons.read_text().replace("4.5,5.5", "nan,nan"))  # of a single video
    assert "+5.00 dB [–, –], better in" in write_page(evaluation).read_text()
    comparisons.unlink()  # of a single method
    assert "▲" not in write_page(evaluation).read_text()


def test_a_mean_is_of_all_seeds_or_of_none(evaluation):
    """A PSNR that is infinite with one of two seeds: the other one alone would be another video's number."""
    path = evaluation / "scores.csv"
    assert path.read_bytes().count(b"new,1,bear,3,27,") == 1
    path.write_bytes(path.read_bytes().replace(b"new,1,bear,3,27,", b"new,1,bear,3,inf,"))
    assert read_data(write_page(evaluation).read_text())["values"]["psnr"] == [[21, 22, 23], [None, 27, 28]]


def test_the_truth_can_be_chosen_where_a_clip_has_it(evaluation):
    """Where an object was pasted in, or filmed, the truth is not what is shown."""
    frames, holes = moving_video(3, 32, 48)
    results = {"new": 255 - frames, "the video itself": frames // 2, "old <i>": frames}
    save_clips(evaluation, VIDEOS[2], frames, holes, results, 10.0)
    data = read_data(write_page(evaluation).read_text())
    assert data["methods"] == ["old <i>", "new", "the video itself"] and data["values"]["psnr"][2] == [None] * 3
    assert data["videos"][2]["clip"]["methods"] == ["new", "the video itself"]


def test_clips_that_a_page_cannot_hold_lie_beside_it(evaluation, monkeypatch):
    size = (evaluation / "clips/bear.mp4").stat().st_size
    monkeypatch.setattr(libs.comparison.page, "INLINE_BYTES", 2 * size)
    page = write_page(evaluation).read_text()
    assert 'id="clip-0"' in page and 'id="clip-1"' not in page and "1 of the clips lie beside this file" in page
    assert [video["href"] for video in read_data(page)["videos"]] == [None, "clips/%3Cb%3E%26%27%22.mp4", None]


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("evaluation.json", None, r"has no evaluation\.json: an output folder of eval_DiffuEraser\.py was needed"),
        ("evaluation.json", "[]", "holds files that are not an evaluation's any more"),
        ("evaluation.json", "{", "holds files that are not an evaluation's any more"),
        ("evaluation.json", '{"methods": []}', r"an evaluation that is not finished: run the same command of eval_"),
        ("evaluation.json", "{}", r"not an evaluation's any more \(KeyError\('scores'\)\)"),
        ("comparisons.csv", "score,mean\nghost,1\n", r"not an evaluation's any more \(KeyError\('ghost'\)\)"),
        ("report.html", "mine", r"holds report\.html, which no earlier result made"),
    ],
)
def test_what_is_no_evaluation_is_refused_in_one_line(evaluation, name, content, message):
    (evaluation / name).unlink(missing_ok=True)
    if content is not None:
        (evaluation / name).write_text(content)
    with pytest.raises(InputError, match=message):
        write_page(evaluation)
    if content == "mine":
        assert "<h1>" in write_page(evaluation, overwrite=True).read_text()


DOCUMENT = """
const videos = [{name: "bear"}];
const document = {createElement() {
  const [classes, parts] = [[], []];
  const appendChild = (part) => { parts.push(part); return part; };
  return {classes, parts, appendChild, classList: {add: (name) => classes.push(name)}, dataset: {}, style: {}};
}};
for (const value of [0.5, 0, -0.5]) {
  const {parts} = bar({number: 0, value}, {decimals: 2}, 1, 1, false);
  console.log(parts[2].textContent, ...parts[2].classes);
}
"""


@pytest.mark.skipif(not shutil.which("node"), reason="runs a part of the page's script with node")
def test_a_tie_is_neither_better_nor_worse():
    """Nor does it count among the videos in which a method is better."""
    (bar,) = re.findall(r"(?s)^function bar\(.*?^}", (FOLDER / "page.js").read_text(), re.MULTILINE)
    shown = subprocess.run(["node", "-e", bar + DOCUMENT], capture_output=True, text=True, check=True).stdout
    assert shown.splitlines() == ["+0.50 better", "0.00", "-0.50 worse"]


def test_every_text_is_there_in_both_languages():
    page, script = ((FOLDER / name).read_text() for name in ("page.html", "page.js"))
    used = re.findall(r'say\("(\w+)"', page + script)
    used += re.findall(r'(?:texts\.|data-(?:text|label|placeholder)=")(\w+)', page)
    used += [key for keys in re.findall(r'menu\("\w+", \[([^\]]*)\]', page) for key in re.findall(r"\w+", keys)]
    used += [*re.findall(r'menu\("(\w+)"', page), "better", "worse", "none", "weights", "baseline", "prior"]
    used += re.findall(r'problem\("(\w+)"\)', script)
    used += ["title", "title_free", "no_clip", "gain", "value", "higher", "lower"]
    assert set(used) == set(TEXTS)
    for english, chinese in TEXTS.values():
        assert sorted(re.findall(r"{\w+}", english)) == sorted(re.findall(r"{\w+}", chinese))
        assert english and chinese and (english != chinese or english == "{method}")


def put_together(about, picture, number):
    """A method's frame as the page draws it, without the region's exact border: (h, w, 3), and (h, w) its own part."""
    (width, height), (down, across) = about["tile"], (about["height"], about["width"])
    column, row = divmod(number, about["rows"])
    tile = picture[row * height : row * height + down, column * width : column * width + across].astype(int)
    grey = (np.abs(tile - clips.GREY) < 6).all(axis=-1)
    return np.where(grey[..., None], picture[:down, :across], tile), ~grey


@pytest.mark.parametrize("highest", [4096, 100])  # one column of three tiles of 48 rows, or two columns
def test_a_clip_shows_the_input_and_every_result(tmp_path, monkeypatch, highest):
    monkeypatch.setattr(clips, "HIGHEST", highest)
    frames, holes = moving_video(4, 40, 100)
    frames = frames[..., :1].repeat(3, axis=-1) // 4 + 40  # without colours, which lose much in 4:2:0
    filled = {
        "flat": np.where(holes[..., None] > 0, np.uint8(20), frames),
        "truth": frames,
        "sharp": np.where(holes[..., None] > 0, 255 - frames, frames),
    }
    save_clips(tmp_path, "bear", frames, holes, filled, 10.0)
    about = json.loads((tmp_path / "clips/bear.json").read_bytes())
    pictures, fps = read_video(tmp_path / "clips/bear.mp4")
    assert fps == 10 and about["methods"] == ["flat", "sharp"] and about["frames"] == 4 == len(about["regions"])
    assert (about["width"], about["height"], about["tile"]) == (100, 40, [112, 48])
    assert pictures.shape[1:3] == ((144, 112) if highest == 4096 else (96, 224))
    for number, clip in enumerate([frames, filled["flat"], filled["sharp"]]):
        for t, picture in enumerate(pictures):
            shown, own = put_together(about, picture, number)
            error = np.abs(shown - clip[t])
            assert error.mean() < 3 and error[holes[t] > 0].mean() < 6
            if number:  # only what a method changed is stored for it, in whole blocks
                assert own[holes[t] > 0].mean() > 0.9 and own.mean() < 0.75


def test_what_a_result_changed_outside_the_hole_is_shown(tmp_path):
    frames, holes = moving_video(2, 32, 64)
    changed = frames.copy()
    changed[:, 25:30, 55:60] = 0
    save_clips(tmp_path, "a", frames, holes, {"raw": changed}, 10.0)
    about = json.loads((tmp_path / "clips/a.json").read_bytes())
    starts = [re.findall(r"M(\d+) (\d+)", path) for path in about["paths"]]
    assert all(len(starts[i]) == 2 and ("52", "22") in starts[i] for i in about["regions"])  # three pixels before it
    assert all(len(starts[i]) == 1 for i in about["outlines"])  # the hole alone


def test_a_clip_keeps_to_its_bytes(tmp_path, monkeypatch):
    frames = np.random.default_rng(0).integers(0, 256, (6, 64, 64, 3), dtype=np.uint8)
    holes = np.full((6, 64, 64), 255, np.uint8)
    sizes = []
    for limit in (10**6, 20_000, 100):  # the last is out of reach, which has to end
        monkeypatch.setattr(clips, "CLIP_BYTES", limit)
        save_clips(tmp_path, "noise", frames, holes, {"a": 255 - frames}, 10.0)
        sizes.append((tmp_path / "clips/noise.mp4").stat().st_size)
    assert 10**6 > sizes[0] > 20_000 > sizes[1] > sizes[2]


def test_fifty_clips_fit_into_a_page():
    limit = libs.comparison.page.INLINE_BYTES
    assert 50 * (clips.CLIP_BYTES * 4 / 3 + 15_000) < limit < 19_600_000


def test_large_frames_become_small():
    assert small_size(240, 432) == (240, 432)
    assert small_size(1080, 1920) == (270, 480)
    assert small_size(1920, 1080) == (480, 270)


def test_an_outline_goes_around_a_region_and_its_islands():
    region = np.zeros((20, 30), np.uint8)
    assert outline(region) == ""
    region[2:8, 3:13] = 255
    assert outline(region) == "M3 2l0 5 9 0 0 -5z"
    region[4:6, 6:9] = 0
    assert outline(region).count("M") == outline(region).count("z") == 2
