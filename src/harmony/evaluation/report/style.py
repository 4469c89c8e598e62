"""How the page looks: one column of sections, light or dark as the reader's system is, nothing from the network."""

CSS = """
:root {
  --page: #f7f7f5; --card: #ffffff; --line: #e4e3df; --grid: #ecebe7; --ink: #16161a; --soft: #55545c; --faint: #8a8993;
  --accent: #2a6fd6; --right: #2a6fd6; --wrong: #d9483b; --hit: #12a06b;
  --c0: #55545c; --c1: #2a78d6; --c2: #13976a; --c3: #d08a00; --c4: #008300; --c5: #5a48bf; --c6: #d9463f;
  --c7: #d0568f; --c8: #d9622b;
  color-scheme: light dark;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #121214; --card: #1b1b1f; --line: #2e2e34; --grid: #29292f; --ink: #f2f2f4;
    --soft: #b4b3bd; --faint: #8d8c97;
    --accent: #6aa5f5; --right: #4c8ff0; --wrong: #e66767; --hit: #2fc08a;
    --c0: #b4b3bd; --c1: #4a93ea; --c2: #22ab7d; --c3: #d49a1c; --c4: #3aa03a; --c5: #9085e9; --c6: #e66767;
    --c7: #dc6fa2; --c8: #e0763f;
  }
}
* { box-sizing: border-box; }
html { scroll-behavior: smooth; scroll-padding-top: 5.5rem; -webkit-text-size-adjust: 100%; }
body {
  margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", "Liberation Sans", sans-serif;
}
nav {
  position: sticky; top: 0; z-index: 5; background: color-mix(in srgb, var(--page) 88%, transparent);
  backdrop-filter: blur(10px); border-bottom: 1px solid var(--line);
}
nav div { max-width: 1180px; margin: auto; padding: 0 24px; display: flex; flex-wrap: wrap; gap: 0 22px; }
nav a { color: var(--soft); text-decoration: none; font-size: 14px; padding: 9px 0; white-space: nowrap; }
nav a:hover { color: var(--ink); }
main { max-width: 1180px; margin: auto; padding: 0 24px 64px; }
header { padding: 52px 0 8px; }
.eyebrow { margin: 0; color: var(--accent); font-size: 14px; font-weight: 600; letter-spacing: .02em; }
h1 { font-size: 44px; line-height: 1.1; letter-spacing: -.022em; margin: 6px 0 10px; overflow-wrap: anywhere; }
h2 { font-size: 26px; letter-spacing: -.014em; line-height: 1.2; margin: 0 0 16px; }
h2:has(+ .lead) { margin-bottom: 6px; }
h3 { font-size: 15px; font-weight: 600; margin: 0; }
h4 { font-size: 13px; font-weight: 500; color: var(--faint); margin: 0 0 8px; }
.says { color: var(--soft); font-size: 14px; max-width: 84ch; margin: 0 0 14px; }
section > h3 + .says { margin-top: -8px; }
.lead { color: var(--soft); max-width: 74ch; margin: 0 0 20px; }
header .lead { font-size: 19px; margin-bottom: 16px; }
section { padding-top: 56px; }
section > h3 { margin: 28px 0 12px; font-size: 17px; }
small { color: var(--faint); font-size: 13px; }
.chips { display: flex; flex-wrap: wrap; gap: 8px; list-style: none; padding: 0; margin: 0 0 28px; }
.chip {
  border: 1px solid var(--line); background: var(--card); border-radius: 99px; padding: 3px 13px; font-size: 14px;
}
.chip small { margin-left: 7px; font-variant-numeric: tabular-nums; }
.facts { display: grid; grid-template-columns: repeat(auto-fill, minmax(240px, 1fr)); gap: 14px 28px; margin: 0; }
.facts div { border-top: 1px solid var(--line); padding-top: 8px; }
dt { color: var(--faint); font-size: 13px; }
dd { margin: 0; font-size: 15px; overflow-wrap: anywhere; }
.about { margin-bottom: 26px; grid-template-columns: repeat(auto-fill, minmax(190px, 1fr)); }
section > .charts { margin-top: 20px; }
.card-rows { margin: 12px 0 0; display: grid; gap: 8px; }
.card-rows div { display: grid; grid-template-columns: 160px 1fr; gap: 16px; }
.note {
  color: var(--soft); background: var(--card); border: 1px dashed var(--line); border-radius: 12px; padding: 16px 20px;
}
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(230px, 1fr)); gap: 14px; }
.card {
  background: var(--card); border: 1px solid var(--line); border-radius: 14px; padding: 18px 20px 16px;
  display: flex; flex-direction: column; font-size: 14px; color: var(--soft);
}
.card .of { font-size: 13px; color: var(--faint); }
.card .big {
  font-size: 38px; line-height: 1.25; font-weight: 650; letter-spacing: -.02em; color: var(--ink); white-space: nowrap;
}
.card .track { margin: 14px 0 7px; }
.card .chance { font-size: 13px; color: var(--faint); }
.track { position: relative; display: block; height: 8px; border-radius: 4px; background: var(--grid); }
.track i { position: absolute; inset: 0 auto 0 0; border-radius: 4px; background: var(--accent); }
.track b {
  position: absolute; top: -3px; bottom: -3px; width: 2px; margin-left: -1px; background: var(--ink); opacity: .55;
}
details { margin-top: 18px; }
summary { cursor: pointer; color: var(--soft); font-size: 15px; width: max-content; }
summary:hover { color: var(--ink); }
.columns { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 320px), 1fr)); gap: 28px; }
.columns { margin-top: 16px; }
.counted { grid-template-columns: repeat(auto-fit, minmax(min(100%, 420px), 1fr)); margin: 32px 0 16px; }
.counted h3 { margin-bottom: 6px; }
@media (min-width: 1000px) { .counted { grid-template-columns: 2fr 1fr; gap: 56px; } }
.table { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 14px; font-variant-numeric: tabular-nums; }
th { color: var(--faint); font-weight: 500; font-size: 13px; }
th, td { text-align: right; padding: 6px 0 6px 16px; border-bottom: 1px solid var(--line); }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
td, th { white-space: nowrap; }
td:first-child, td.words { white-space: normal; overflow-wrap: break-word; min-width: 100px; }
th.words, td.words { text-align: left; padding-left: 24px; }
td small { margin-left: 8px; }
td .wrap { white-space: normal; overflow-wrap: anywhere; }
td .uri { margin: 0; }
td a { color: var(--accent); text-decoration: none; }
td a:hover { text-decoration: underline; }
.tried { width: auto; }
.tried td { background: color-mix(in srgb, var(--accent) var(--shade, 0%), transparent); padding-left: 14px; }
.tried td:first-child, .tried th:first-child { padding-right: 20px; white-space: nowrap; }
.tried td, .tried th { padding-right: 10px; white-space: nowrap; }
.tried .chosen { outline: 2px solid var(--ink); outline-offset: -2px; border-radius: 4px; font-weight: 650; }
.narrow { max-width: 560px; }
pre {
  background: var(--card); border: 1px solid var(--line); border-radius: 12px; padding: 18px 20px; overflow-x: auto;
  font: 13px/1.55 ui-monospace, "SF Mono", Menlo, Consolas, "Liberation Mono", monospace;
}
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(256px, 1fr)); gap: 14px; }
.charts.wide { grid-template-columns: repeat(auto-fill, minmax(min(100%, 340px), 1fr)); }
figure { margin: 0; }
.chart {
  background: var(--card); border: 1px solid var(--line); border-radius: 14px; padding: 13px 14px 12px 16px;
  position: relative; display: flex; flex-direction: column; min-width: 0;
}
.chart .head {
  display: flex; justify-content: space-between; align-items: baseline; gap: 2px 14px; margin-bottom: 8px;
}
.chart .now { font-size: 15px; font-variant-numeric: tabular-nums; color: var(--soft); }
.legend { display: flex; flex-wrap: wrap; gap: 0 12px; font-size: 13px; margin-top: 4px; }
.key { white-space: nowrap; }
.key i {
  display: inline-block; width: 11px; height: 3px; border-radius: 2px; margin-right: 5px; vertical-align: middle;
  background: currentColor;
}
.key .dashed { background: repeating-linear-gradient(90deg, currentColor 0 4px, transparent 4px 6px); }
figcaption { color: var(--soft); font-size: 13px; line-height: 1.45; margin-top: 6px; }
svg { display: block; width: 100%; height: auto; overflow: visible; }
svg text { fill: var(--faint); font-size: 10.5px; font-variant-numeric: tabular-nums; }
svg .left, svg .end { text-anchor: end; }
svg .marked { paint-order: stroke; stroke: var(--card); stroke-width: 3px; stroke-linejoin: round; }
.grid { stroke: var(--grid); stroke-width: 1; }
.mark { stroke: var(--faint); stroke-width: 1; stroke-dasharray: 4 4; }
.line, .raw { fill: none; stroke: currentColor; stroke-linejoin: round; stroke-linecap: round; }
.line { stroke-width: 2; }
.line.dashed { stroke-dasharray: 5 3; }
.raw { stroke-width: 1; opacity: .3; }
.dot { fill: currentColor; }
.cursor { stroke: var(--faint); stroke-width: 1; }
.tip {
  position: absolute; z-index: 3; pointer-events: none; background: var(--ink); color: var(--page); border-radius: 10px;
  padding: 7px 12px; font-size: 12.5px; line-height: 1.5; font-variant-numeric: tabular-nums; white-space: nowrap;
  display: grid; grid-template-columns: auto auto auto; column-gap: 8px; align-items: center;
}
.tip em { grid-column: 1 / -1; font-style: normal; opacity: .7; }
.tip i { width: 10px; height: 3px; border-radius: 2px; background: currentColor; }
.tip b { font-weight: 600; text-align: right; }
.c0 { color: var(--c0); } .c1 { color: var(--c1); } .c2 { color: var(--c2); }
.c3 { color: var(--c3); } .c4 { color: var(--c4); } .c5 { color: var(--c5); }
.c6 { color: var(--c6); } .c7 { color: var(--c7); } .c8 { color: var(--c8); }
img { display: block; width: 100%; height: auto; border-radius: 8px; }
.triples { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 330px), 1fr)); gap: 22px; }
.triples div { display: grid; grid-template-columns: 1fr 1fr 1fr; gap: 4px; }
.tile figcaption { margin-top: 3px; text-align: center; font-size: 12.5px; color: var(--faint); }
.heads { display: grid; grid-template-columns: repeat(7, 1fr); gap: 4px; margin-bottom: 12px; }
.map { image-rendering: pixelated; background: var(--grid); }
.swatches { display: flex; flex-wrap: wrap; gap: 4px 16px; font-size: 13px; margin-bottom: 14px; color: var(--soft); }
.swatch i { display: inline-block; width: 11px; height: 11px; border-radius: 3px; margin-right: 6px; }
.scenes { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 500px), 1fr)); gap: 22px; }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: 6px; }
.scene { position: relative; }
.scene svg { position: absolute; inset: 0; height: 100%; overflow: hidden; border-radius: 8px; }
.box { fill: none; stroke-width: 2; filter: drop-shadow(0 0 1px rgb(0 0 0 / .7)); }
svg .plate { font-weight: 500; }
svg .light { fill: #fff; }
svg .dark { fill: #111; }
.queries { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 430px), 1fr)); gap: 18px; }
.query {
  background: var(--card); border: 1px solid var(--line); border-radius: 14px; padding: 14px 18px 18px; min-width: 0;
}
.query p { margin: 0 0 10px; font-size: 15px; line-height: 1.4; }
.query q { font-weight: 550; }
.strip { display: flex; gap: 7px; align-items: center; }
.strip span { flex: 1 1 0; min-width: 0; max-width: 92px; position: relative; }
.strip .dots { flex: 0 0 auto; color: var(--faint); }
.strip .lost { font-size: 11px; color: var(--faint); text-align: center; }
.strip img { outline: 1px solid var(--line); }
.strip .own { outline: 3px solid var(--hit); outline-offset: 1px; }
.all .bars { display: block; columns: 320px; column-gap: 40px; }
.all .bar { break-inside: avoid; margin-bottom: 7px; }
.confusions { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 400px), 1fr)); gap: 28px 48px; }
.confusions { margin-top: 36px; align-items: start; }
/* bars within a card */
.chart .bars { flex: 1; align-content: center; gap: 9px; }
.chart .bar { grid-template-columns: 94px 1fr 74px; gap: 8px; font-size: 12.5px; }
.chart .track i { background: currentColor; }
.confusions h3 { margin-bottom: 12px; }
.bars { display: grid; gap: 7px; }
.bar {
  display: grid; grid-template-columns: minmax(90px, 34%) 1fr 138px; gap: 12px; align-items: center; font-size: 14px;
}
.bar .label { text-align: right; white-space: nowrap; overflow: hidden; text-overflow: ellipsis; color: var(--soft); }
.bar .value { font-variant-numeric: tabular-nums; white-space: nowrap; }
.bar .value small { margin-left: 6px; }
.heat { max-width: 440px; background: var(--card); border-radius: 8px; outline: 1px solid var(--line); }
.heat .right { fill: var(--right); } .heat .wrong { fill: var(--wrong); }
footer { color: var(--faint); font-size: 13px; padding-top: 56px; }
@media (max-width: 900px) { nav div { flex-wrap: nowrap; overflow-x: auto; scrollbar-width: none; } }
@media (max-width: 560px) {
  h1 { font-size: 32px; }
  .queries { grid-template-columns: 1fr; }
  .bar { grid-template-columns: 30% 1fr 138px; gap: 8px; }
  td:first-child, td.words { min-width: 84px; }
  th.words, td.words { padding-left: 12px; }
  .card-rows div { grid-template-columns: 1fr; gap: 0; }
  .pair { grid-template-columns: 1fr; }
  .heads { grid-template-columns: repeat(4, 1fr); }
  main, nav div { padding-left: 16px; padding-right: 16px; }
}
@media print { nav { display: none; } .chart, .card, .query { break-inside: avoid; } }
"""

SCRIPT = """
"use strict";
const round = (value, share) => {
  if (share) return (100 * value).toPrecision(3) + " %";
  return Math.abs(value) >= 1000 ? Math.round(value).toLocaleString("en") : String(+value.toPrecision(4));
};
const node = (name, values, content) => {
  const made = Object.assign(document.createElement(name), values);
  made.append(...content);
  return made;
};
const drawn = (name, values) => {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(values)) made.setAttribute(key, value);
  return made;
};
for (const svg of document.querySelectorAll("svg[data-chart]")) {
  const { lines, share, before, after, top, bottom } = JSON.parse(svg.dataset.chart);
  const figure = svg.parentElement;
  let shown = [];
  const clear = () => { for (const part of shown) part.remove(); shown = []; };
  svg.addEventListener("pointermove", (event) => {
    clear();
    const box = svg.getBoundingClientRect(), outer = figure.getBoundingClientRect();
    const place = (event.clientX - box.left) * svg.viewBox.baseVal.width / box.width;
    const nearer = (a, b) => Math.abs(b[2] - place) < Math.abs(a[2] - place) ? b : a;
    const found = lines.map((line) => [line, line.points.reduce(nearer)]);
    const [, [step, , x]] = found[0];
    shown = [drawn("line", { x1: x, x2: x, y1: top, y2: bottom, class: "cursor" })];
    for (const [line, point] of found) {
      shown.push(drawn("circle", { cx: point[2], cy: point[3], r: 3.5, class: "dot c" + line.colour }));
    }
    svg.append(...shown);
    const at = (point) => before + round(after ? point : Math.round(point), false) + after;
    const together = found.every(([, point]) => point[2] === x);
    const cells = found.flatMap(([line, point]) => [
      node("i", { className: "c" + line.colour }, []),
      node("span", {}, [together ? line.name : line.name + ", " + at(point[0])]),
      node("b", {}, [round(point[1], share)]),
    ]);
    const when = together ? [node("em", {}, [at(step)])] : [];
    const tip = node("div", { className: "tip" }, [...when, ...cells]);
    figure.append(tip);
    shown.push(tip);
    const left = event.clientX - outer.left - tip.offsetWidth / 2;
    tip.style.left = Math.max(6, Math.min(left, outer.width - tip.offsetWidth - 6)) + "px";
    tip.style.top = box.bottom - outer.top + "px";  // below the curves, so that it hides none of them
  });
  svg.addEventListener("pointerleave", clear);
}
"""
