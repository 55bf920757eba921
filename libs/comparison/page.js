"use strict";
// `root` and `kept` (what the browser keeps of this reader's choices) come from the page's head.

const $ = (id) => document.getElementById(id);
const data = JSON.parse($("data").textContent);
const {methods, videos, texts} = data;
const INPUT = -1; // beside the methods' numbers
const [canvas, video] = [$("canvas"), $("video")];
const context = canvas.getContext("2d");
const spare = document.createElement("canvas"); // one side of a difference
const state = {video: 0, frame: 0, wanted: null, split: 0.5, playing: false, order: [], url: null};
let picture = video; // what is drawn from
let language = kept.language ? Number(kept.language) : Number(navigator.language.startsWith("zh"));

// Words

const say = (key, values = {}) => texts[key][language].replace(/\{(\w+)\}/g, (_, name) => values[name]);
const nameOf = (side) => (side === INPUT ? say("input") : methods[side]);
const side = (id) => Number($(id).value);

function speak() {
  root.lang = ["en", "zh"][language];
  for (const element of document.querySelectorAll("[data-text]")) {
    element.textContent = say(element.dataset.text, JSON.parse(element.dataset.values || "{}"));
  }
  for (const element of document.querySelectorAll("[data-label]")) {
    element.ariaLabel = element.title = say(element.dataset.label);
  }
  $("filter").placeholder = say("filter");
  for (const id of ["left", "right"]) {
    $(id).options[0].textContent = say("input");
  }
  document.title = document.querySelector("h1").textContent;
  list();
  describe();
}

function fill(menu, entries) {
  menu.replaceChildren(...entries.map(([value, text]) => new Option(text, value)));
}

// The list: a bar per video

// What the bars show: the method on the right, less the one on the left or else the one that all are compared with.
function compared() {
  const [left, right, reference] = [side("left"), side("right"), methods.indexOf(data.reference)];
  const method = right === INPUT ? left : right;
  const base = left !== INPUT && left !== method ? left : reference;
  return {method, base: base === method ? null : base};
}

function rows() {
  const values = data.values[$("score").value];
  const {method, base} = compared();
  if (!values || method === INPUT) return [];
  return videos.map((_, number) => {
    const [value, other] = [values[method][number], base === null ? 0 : values[base][number]];
    return {number, value: value === null || other === null ? null : value - other};
  });
}

function list() {
  const [score, {method, base}] = [$("score").value, compared()];
  const about = data.scores[score];
  const sign = about?.higher_is_better ? 1 : -1;
  const wanted = $("filter").value.toLowerCase();
  const all = rows();
  const found = all.filter(({number}) => videos[number].name.toLowerCase().includes(wanted));
  const gain = ({value}) => (value === null ? -Infinity : sign * value); // those without a value come last
  const orders = {
    best_first: (a, b) => gain(b) - gain(a) || a.number - b.number,
    worst_first: (a, b) => (a.value === null) - (b.value === null) || gain(a) - gain(b) || a.number - b.number,
    by_name: (a, b) => videos[a.number].name.localeCompare(videos[b.number].name),
    as_scored: (a, b) => a.number - b.number,
  };
  found.sort(orders[$("sort").value]);
  const largest = Math.max(...all.map(({value}) => Math.abs(value ?? 0))) || 1;
  state.order = found.map(({number}) => number);
  $("bars").replaceChildren(...found.map((row) => bar(row, about, sign, largest, base === null)));
  $("about").textContent = all.length ? title(score, method, base, found.length, all.length) : say("nothing");
  choose();
}

function bar({number, value}, about, sign, largest, alone) {
  const item = Object.assign(document.createElement("li"), {role: "option", title: videos[number].name});
  item.dataset.video = number;
  const [name, track, shown] = ["span", "span", "span"].map((kind) => item.appendChild(document.createElement(kind)));
  [name.className, track.className, shown.className] = ["name", alone ? "track" : "track two-sided", "value"];
  name.textContent = videos[number].name;
  if (value === null) {
    shown.textContent = "–";
    return item;
  }
  shown.textContent = (value > 0 && !alone ? "+" : "") + value.toFixed(about.decimals);
  const [piece, better] = [track.appendChild(document.createElement("i")), sign * value >= 0];
  const width = (Math.abs(value) / largest) * (alone ? 100 : 50);
  piece.style.width = `${width}%`;
  piece.style.left = `${alone ? 0 : better ? 50 : 50 - width}%`;
  if (!alone && value) [piece, shown].forEach((element) => element.classList.add(better ? "better" : "worse"));
  return item;
}

function title(score, method, base, shown, all) {
  const {heading, unit, higher_is_better: higher} = data.scores[score];
  const what = say(base === null ? "value" : "gain", {method: nameOf(method), reference: methods[base]});
  const lines = [say("bars", {heading, unit: unit && `,${unit}`, direction: say(higher ? "higher" : "lower"), what})];
  const verdict = methods[base] === data.reference && data.verdicts[score]?.[methods[method]];
  if (verdict) lines.push(say(verdict.found, verdict));
  if (shown < all) lines.push(say("shown", {shown, all}));
  return lines.join(" · ");
}

function choose() {
  for (const item of $("bars").children) {
    const chosen = Number(item.dataset.video) === state.video;
    item.ariaSelected = String(chosen);
    if (chosen) { // within the list only: the page stays where it is
      const [list, box] = [$("bars").getBoundingClientRect(), item.getBoundingClientRect()];
      if (box.top < list.top) $("bars").scrollTop -= list.top - box.top;
      if (box.bottom > list.bottom) $("bars").scrollTop += box.bottom - list.bottom;
    }
  }
}

// The clip: tiles of one video, put together on a canvas

const clip = () => videos[state.video]?.clip;

function open(number) {
  state.video = number;
  [state.frame, state.wanted] = [0, null];
  const before = state.url;
  state.url = null;
  const {href, clip: about, sheet} = videos[number];
  const inline = $(`clip-${number}`);
  if (inline) {
    const bytes = Uint8Array.from(atob(inline.textContent), (letter) => letter.charCodeAt(0));
    state.url = URL.createObjectURL(new Blob([bytes], {type: "video/mp4"}));
  }
  problem(about ? "" : "no_clip");
  canvas.hidden = !about;
  if (about) {
    video.src = state.url || href;
    video.playbackRate = Number($("speed").value);
    $("frame").max = about.frames - 1;
    fit();
    if (state.playing) play(true);
  } else {
    video.removeAttribute("src");
    video.load();
  }
  if (before) URL.revokeObjectURL(before); // now that the player has let go of it
  $("sheet").hidden = !sheet;
  if (sheet) $("sheet").href = sheet;
  choose();
  describe();
}

function problem(key) {
  $("problem").hidden = !key;
  $("problem").dataset.text = key || "no_clip";
  $("problem").textContent = key && say(key);
}

function describe() {
  const [view, left, right] = [$("view").value, nameOf(side("left")), nameOf(side("right"))];
  $("name").textContent = videos[state.video]?.name ?? "";
  $("tag-left").textContent = view === "difference" ? `|${left} − ${right}| × 4` : left;
  $("tag-right").textContent = right;
  $("tag-left").hidden = !clip();
  $("tag-right").hidden = !clip() || view === "difference";
  canvas.style.cursor = view === "slider" ? "ew-resize" : "default";
  canvas.ariaValueNow = String(Math.round(100 * state.split));
  const frames = clip()?.frames ?? 0;
  $("count").textContent = `${say("frame")} ${frames ? state.frame + 1 : 0} / ${frames}`;
  $("frame").value = state.frame;
  $("play").textContent = state.playing ? "▮▮" : "▶";
}

// The canvas gets the pixels that the screen has, so that lines are sharp.
function fit() {
  if (!clip()) return;
  const across = $("view").value === "sides" ? 2 : 1;
  canvas.style.aspectRatio = `${across * clip().width} / ${clip().height}`;
  canvas.width = Math.round(canvas.clientWidth * devicePixelRatio);
  canvas.height = Math.round((canvas.width * clip().height) / clip().width / across);
  draw();
}

function draw() {
  if (!clip() || video.readyState < 2 || !canvas.width) return;
  // A busy browser may show another frame by now than it told of: this one knows its time. Files beside the page, which
  // are another origin, allow no such look.
  picture = state.url && window.VideoFrame ? new VideoFrame(video) : video;
  if (picture !== video) state.frame = frameAt(picture.timestamp / 1e6);
  drawView();
  if (picture !== video) picture.close();
}

function drawView() {
  const [left, right, {width, height}] = [side("left"), side("right"), canvas];
  const view = $("view").value;
  context.clearRect(0, 0, width, height);
  if (view === "difference") {
    drawDifference(left, right);
  } else if (view === "sides") {
    drawSide(context, left, 0, width / 2, height);
    drawSide(context, right, width / 2, width / 2, height);
  } else {
    drawSide(context, right, 0, width, height);
    context.save();
    context.beginPath();
    context.rect(0, 0, state.split * width, height);
    context.clip();
    drawSide(context, left, 0, width, height);
    context.restore();
    drawDivider();
  }
}

// The input, and over it, inside the region, a method.
function drawSide(target, number, x, width, height, outline = $("outline").checked) {
  const {width: across, height: down, tile, rows} = clip();
  const place = (index) => [Math.floor(index / rows) * tile[0], (index % rows) * tile[1]];
  target.save();
  target.translate(x, 0);
  target.scale(width / across, height / down);
  target.drawImage(picture, ...place(0), across, down, 0, 0, across, down);
  const index = clip().methods.indexOf(methods[number]);
  if (index >= 0) {
    target.save();
    target.translate(0.5, 0.5); // a path runs through the middles of pixels
    target.clip(pathOf("regions"), "evenodd");
    target.translate(-0.5, -0.5);
    target.drawImage(picture, ...place(index + 1), across, down, 0, 0, across, down);
    target.restore();
  }
  if (outline) drawOutline(target, across / width);
  target.restore();
}

const pathOf = (kind) => new Path2D(clip().paths[clip()[kind][state.frame]]);

function drawOutline(target, pixel) {
  target.translate(0.5, 0.5);
  for (const [colour, size] of [["rgb(0 0 0 / .5)", 3], ["#ffd83d", 1.2]]) {
    target.strokeStyle = colour;
    target.lineWidth = size * pixel * devicePixelRatio;
    target.stroke(pathOf("outlines"));
  }
}

function drawDifference(left, right) {
  const {width, height} = canvas;
  [spare.width, spare.height] = [width, height];
  drawSide(context, left, 0, width, height, false);
  drawSide(spare.getContext("2d"), right, 0, width, height, false);
  context.save();
  context.globalCompositeOperation = "difference";
  context.drawImage(spare, 0, 0);
  context.globalCompositeOperation = "lighter"; // twice two are four
  context.drawImage(canvas, 0, 0);
  context.drawImage(canvas, 0, 0);
  context.restore();
  if ($("outline").checked) {
    context.save();
    context.scale(width / clip().width, height / clip().height);
    drawOutline(context, clip().width / width);
    context.restore();
  }
}

function drawDivider() {
  const [x, middle, unit] = [state.split * canvas.width, canvas.height / 2, devicePixelRatio];
  context.fillStyle = "#fff";
  context.fillRect(x - unit, 0, 2 * unit, canvas.height);
  context.beginPath();
  context.arc(x, middle, 13 * unit, 0, 7);
  context.fill();
  context.fillStyle = "#222";
  for (const way of [-1, 1]) {
    context.beginPath();
    context.moveTo(x + way * 9 * unit, middle);
    context.lineTo(x + way * 3 * unit, middle - 5 * unit);
    context.lineTo(x + way * 3 * unit, middle + 5 * unit);
    context.fill();
  }
}

// Time

const frameAt = (seconds) => Math.min(clip().frames - 1, Math.max(0, Math.floor(seconds * clip().fps + 0.01)));

function showFrame(seconds) {
  if (!clip()) return;
  state.frame = frameAt(seconds);
  draw();
  describe();
}

function watch() {
  if (video.requestVideoFrameCallback) {
    video.requestVideoFrameCallback((_, {mediaTime}) => {
      showFrame(mediaTime);
      watch();
    });
  } else { // an old browser: a frame may be late by one
    if (!video.paused) showFrame(video.currentTime);
    requestAnimationFrame(watch);
  }
}

// Seeking takes a while: of wishes that come meanwhile, the newest one is carried out.
function seek(frame) {
  if (!clip()) return;
  play(false);
  state.wanted = (frame + clip().frames) % clip().frames;
  if (!video.seeking) video.currentTime = (state.wanted + 0.5) / clip().fps;
}

function seekOn() {
  const reached = Math.floor(video.currentTime * clip()?.fps);
  if (video.paused && state.wanted !== null && state.wanted !== reached) seek(state.wanted);
}

function play(wanted) {
  state.playing = wanted && Boolean(clip());
  if (state.playing) state.wanted = null;
  if (state.playing) video.play().catch((error) => error.name === "AbortError" || problem("broken"));
  else video.pause();
  describe();
}

// What the reader does

function next(by) {
  const place = state.order.indexOf(state.video);
  if (state.order.length) open(state.order[(place + by + state.order.length) % state.order.length]);
}

function split(share) {
  state.split = Math.min(1, Math.max(0, share));
  draw();
  describe();
}

function step(menu, by = 1) {
  const count = menu.options.length;
  menu.selectedIndex = (menu.selectedIndex + by + count) % count;
  menu.dispatchEvent(new Event("change"));
}

function swap() {
  [$("left").value, $("right").value] = [$("right").value, $("left").value];
  change();
}

function change() {
  list();
  describe();
  draw();
}

function turnTheme() {
  const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  kept.theme = root.dataset.theme = dark ? "light" : "dark";
}

function turnLanguage() {
  kept.language = language = 1 - language;
  speak();
}

const KEYS = {
  " ": () => play(!state.playing),
  ArrowLeft: () => seek((state.wanted ?? state.frame) - 1),
  ArrowRight: () => seek((state.wanted ?? state.frame) + 1),
  ArrowUp: () => next(-1),
  ArrowDown: () => next(1),
  "[": () => split(state.split - 0.05),
  "]": () => split(state.split + 0.05),
  v: () => step($("view")),
  o: () => $("outline").click(),
  x: swap,
  m: () => step($("right")),
  "/": () => $("filter").focus(),
  t: turnTheme,
  l: turnLanguage,
};

document.addEventListener("keydown", (event) => {
  const {key, target} = event;
  if (key === "Escape") target.blur();
  const typing = target.matches("select, input:not([type=checkbox])") || (target.matches("button, a, summary, [type=checkbox]") && key === " ");
  if (typing || event.ctrlKey || event.metaKey || event.altKey || !Object.hasOwn(KEYS, key)) return;
  event.preventDefault();
  KEYS[key]();
});

canvas.addEventListener("pointerdown", (event) => {
  canvas.setPointerCapture(event.pointerId);
  drag(event);
});
canvas.addEventListener("pointermove", (event) => event.buttons && drag(event));

function drag(event) {
  if ($("view").value === "slider") split(event.offsetX / canvas.clientWidth);
}

$("bars").addEventListener("click", (event) => {
  const item = event.target.closest("li");
  if (item) open(Number(item.dataset.video));
});
for (const id of ["left", "right", "score", "sort"]) $(id).addEventListener("change", change);
$("view").addEventListener("change", () => {
  fit();
  describe();
});
$("filter").addEventListener("input", list);
$("outline").addEventListener("change", draw);
$("swap").addEventListener("click", swap);
$("play").addEventListener("click", () => play(!state.playing));
$("frame").addEventListener("input", () => seek(Number($("frame").value)));
$("speed").addEventListener("change", () => { video.playbackRate = Number($("speed").value); });
$("theme").addEventListener("click", turnTheme);
$("language").addEventListener("click", turnLanguage);
video.addEventListener("loadeddata", draw);
video.addEventListener("seeked", seekOn);
video.addEventListener("error", () => clip() && problem("broken"));
new ResizeObserver(fit).observe($("stage"));

// The start; the clips follow this script, so that the page is there before they are.

for (const element of document.querySelectorAll(".scripted")) element.hidden = false;
for (const id of ["left", "right"]) fill($(id), [[INPUT, ""], ...methods.entries()]);
fill($("score"), Object.entries(data.scores).map(([name, {heading}]) => [name, heading]));
$("left").value = INPUT;
$("right").value = methods.indexOf(data.right);
$("score").value = data.score;
speak();
watch();
document.addEventListener("DOMContentLoaded", () => videos.length && open(state.order[0] ?? 0));
