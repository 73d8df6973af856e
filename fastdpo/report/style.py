"""The style sheet of the report page, and the texts on it that are the same for all runs."""

STYLE = """
:root {
  color-scheme: light dark;
  --paper: #fbfaf7; --ink: #1b1f25; --soft: #59606c; --rule: #dcd8cf; --well: #f3f1eb;
  --start: #b0500a; --now: #1f5fa8;
  --sans: ui-sans-serif, system-ui, "Segoe UI", Roboto, "Helvetica Neue", "Liberation Sans", Arial,
    sans-serif;
  --serif: "Iowan Old Style", Charter, "Palatino Linotype", Palatino, "URW Palladio L", P052,
    Georgia, serif;
  --mono: ui-monospace, SFMono-Regular, Menlo, Consolas, "Liberation Mono", monospace;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #14171b; --ink: #e5e3de; --soft: #a0a7b1; --rule: #333941; --well: #1c2026;
    --start: #eba25a; --now: #82b6f2;
  }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body {
  margin: 0 auto; padding: 0 clamp(1rem, 4vw, 3rem) 4rem; max-width: 78rem;
  background: var(--paper); color: var(--ink); font: 1rem/1.55 var(--sans);
  font-variant-numeric: lining-nums;
}
h1, h2, h3 { font-family: var(--serif); font-weight: 600; line-height: 1.2; text-wrap: balance; }
h1 { margin: .2rem 0 .5rem; font-size: clamp(1.9rem, 5vw, 2.75rem); letter-spacing: -.015em;
  overflow-wrap: anywhere; }
h2 { margin: 0 0 1.25rem; font-size: 1.5rem; letter-spacing: -.005em; }
h3 { margin: 0 0 .5rem; font-size: 1.1rem; }
h4 { display: flex; justify-content: space-between; align-items: center; gap: 1rem; margin: 0;
  font-size: .9rem; font-weight: 600; }
p { margin: 0 0 .75rem; }
a { color: var(--now); text-underline-offset: .2em; text-decoration-thickness: 1px; }
:focus-visible { outline: 2px solid var(--now); outline-offset: 3px; }
header { padding-top: clamp(2rem, 6vw, 4rem); }
section { margin-top: 3.25rem; padding-top: 1.5rem; border-top: 1px solid var(--rule); }
footer { margin-top: 3.5rem; padding-top: 1rem; border-top: 1px solid var(--rule); }
.kind { margin: 0; color: var(--soft); font-size: .85rem; }
.facts, .status { margin: 0; color: var(--soft); overflow-wrap: anywhere; }
.facts b { color: var(--ink); font-weight: 500; }
nav { display: flex; flex-wrap: wrap; gap: .35rem 1.4rem; margin-top: 2rem; font-size: .9rem; }
.note, footer p, .gone { max-width: 75ch; color: var(--soft); font-size: .875rem; }
.note { margin: 1rem 0 0; }
.gone { padding-left: .8rem; border-left: 3px solid var(--start); overflow-wrap: anywhere;
  margin-top: 1rem; }
.none { color: var(--soft); font-style: italic; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(10rem, 1fr));
  gap: 1.5rem 2rem; margin: 2.25rem 0 0; }
.tiles div { border-top: 2px solid var(--ink); padding-top: .6rem; }
.tiles dt { color: var(--soft); font-size: .85rem; }
dd { margin: 0; }
.big { font-size: 1.6rem; line-height: 1.3; font-weight: 500; letter-spacing: -.01em; }
.big, .sub, .meta, td { font-variant-numeric: lining-nums tabular-nums; }
.sub { color: var(--soft); font-size: .85rem; }
.pm { color: var(--soft); font-size: .92em; white-space: nowrap; font-weight: 400; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .92rem; }
caption { text-align: left; color: var(--soft); font-size: .85rem; padding-bottom: .5rem; }
th, td { padding: .5rem 0 .5rem 1.25rem; text-align: right; vertical-align: top;
  white-space: nowrap; border-bottom: 1px solid var(--rule); }
thead th { color: var(--soft); font-weight: 500; font-size: .85rem; vertical-align: bottom; }
th:first-child { padding-left: 0; text-align: left; position: sticky; left: 0;
  background: var(--paper); }
tbody th { font-weight: 600; white-space: normal; min-width: 5.5rem; overflow-wrap: anywhere; }
td .sub { display: block; font-size: .82rem; }
.panels { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 19rem), 1fr));
  gap: 2rem 2.5rem; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr));
  gap: 2rem 3rem; align-items: start; }
.stack { display: grid; gap: 2rem; grid-template-columns: minmax(0, 1fr); }
.stack table { width: auto; }
figure { margin: 0; min-width: 0; }
figcaption { margin-bottom: .5rem; font-size: .9rem; color: var(--soft); }
figcaption b { color: var(--ink); font-weight: 600; }
.keys { display: grid; gap: .3rem; margin: 0 0 .75rem; padding: 0; list-style: none; }
.keys li { padding-left: 1.4rem; text-indent: -1.4rem; }
.keys li::before { content: ""; display: inline-block; width: .7rem; height: .7rem;
  margin-right: .7rem; print-color-adjust: exact; -webkit-print-color-adjust: exact; }
.keys .k0::before { background: var(--start); border-radius: 50%; }
.keys .k1::before { background: var(--now); }
svg { display: block; width: 100%; height: auto; overflow: visible; }
.wide { max-width: 54rem; }
svg text { fill: var(--soft); font: 12px var(--sans); font-variant-numeric: tabular-nums; }
svg .mid { text-anchor: middle; }
svg .last { text-anchor: end; }
svg path { fill: none; stroke-linejoin: round; }
svg .grid { stroke: var(--rule); }
svg .border { stroke: var(--soft); stroke-dasharray: 1 3; }
svg .level { stroke: var(--soft); stroke-dasharray: 4 4; }
svg .line { stroke: var(--now); stroke-width: 2; stroke-linecap: round; }
svg .bar { stroke: var(--now); stroke-width: 1.5; }
svg .dot { fill: var(--now); stroke: var(--paper); stroke-width: 1.5; }
svg .band { fill: var(--now); opacity: .18; }
svg .c0 { stroke: var(--start); }
svg .c1 { stroke: var(--now); }
svg .dots { opacity: .6; stroke-width: 6; stroke-linecap: round; }
svg .dots.c1 { stroke-width: 5; stroke-linecap: square; }
svg .fit { stroke-width: 1.5; }
svg .fit.c0 { stroke-dasharray: 7 4; }
svg .halo { stroke: var(--paper); stroke-width: 8; }
svg .mean { stroke-width: 2.5; }
svg circle.mean { fill: var(--paper); }
article { margin-top: 2.25rem; }
.prompt { max-width: 75ch; padding: .1rem 0 .1rem 1rem; border-left: 3px solid var(--rule); }
.role { margin: .4rem 0 0; color: var(--soft); font-size: .8rem; }
.side { display: grid; grid-auto-flow: column; grid-auto-columns: minmax(16.5rem, 1fr);
  gap: 1.25rem; margin-top: 1rem; }
.answer { padding: .9rem 1rem; background: var(--well); border-radius: 4px; min-width: 0;
  print-color-adjust: exact; -webkit-print-color-adjust: exact; }
.meta { margin: .1rem 0 .7rem; color: var(--soft); font-size: .82rem; }
.meta b { color: var(--ink); font-weight: 600; }
.cut { white-space: nowrap; padding: 0 .4em; border: 1px solid currentColor; border-radius: 3px;
  color: var(--start); font-size: .8em; font-weight: 400; }
.text { margin: 0 0 .4rem; font-family: var(--serif); font-size: 1rem; line-height: 1.5;
  white-space: pre-wrap; overflow-wrap: anywhere; overflow: hidden; unicode-bidi: isolate; }
.long { max-height: 26rem; overflow: auto; }
.code { padding: 0 .3em; border: 1px solid currentColor; border-radius: 3px; color: var(--start);
  font: .72em var(--mono); white-space: nowrap; unicode-bidi: isolate; }
summary { color: var(--now); font-size: .85rem; cursor: pointer; }
.config { columns: 3 20rem; column-gap: 2.5rem; margin: 0; }
.config div { display: grid; grid-template-columns: minmax(0, 11rem) minmax(0, 1fr); gap: 0 1rem;
  padding: .3rem 0; border-bottom: 1px solid var(--rule); break-inside: avoid; }
.config dt { color: var(--soft); font-size: .85rem; overflow-wrap: anywhere; }
.config .text { margin: 0; font: .82rem/1.5 var(--mono); }
@media (max-width: 34rem) {
  .tiles { grid-template-columns: 1fr 1fr; gap: 1.25rem; }
  .big { font-size: 1.2rem; }
  .wide text { font-size: 21px; }
  svg .dots.c0 { stroke-width: 11; }
  svg .dots.c1 { stroke-width: 9; }
}
@media print {
  :root { color-scheme: light; --paper: #fff; --ink: #000; --soft: #444; --rule: #bbb;
    --well: #f4f4f4; --start: #b0500a; --now: #1f5fa8; }
  body { max-width: none; padding: 0; font-size: 9.5pt; }
  nav { display: none; }
  section { margin-top: 1.5rem; }
  .panels { grid-template-columns: repeat(3, minmax(0, 1fr)); gap: 1.25rem; }
  th:first-child { position: static; }
  .scroll, .long { overflow: visible; max-height: none; }
  .side { grid-auto-columns: minmax(0, 1fr); gap: .6rem; }
  h2, h3, caption, .keys { break-after: avoid; }
  figure, article, tr, .tiles { break-inside: avoid; }
}
"""

NOTES = (
    '<p class="note">Under score and length: the change to the start on the same prompts. '
    "<b>Win rate</b>: how often a response scores higher than one of the start to the same prompt, "
    "a tie counting half. {distance} <b>Cut off</b>: responses that reached max_new_tokens. "
    "<b>Margin</b>, <b>accuracy</b> and <b>loss</b> are means over the round’s training steps, "
    "which begin at zero margin where the reference is the round’s start. <b>Pairs</b>: those "
    "that training took.{control}</p>"
)
KL = (
    "<b>KL from the start</b>: mean of log(policy/start) over the policy’s own responses, whole "
    "responses in nats."
)
LOG_RATIO = (
    "<b>Log-ratio to the start</b>: mean of log(policy/start) over the policy’s own responses, "
    "whole responses in nats. It is no KL divergence: responses were not sampled from the policy "
    "itself but at {sampling}, while both probabilities are those of the model."
)
CONTROL = (
    " <b>α</b> is the length controller’s, which keeps it within its bound and holds the mean "
    "length of sampled responses at the <b>target</b>."
)
READING = (
    "<p>Each ± is half a 95% interval, by Student’s t over held-out prompts after averaging the "
    "responses to a prompt. None says what another seed of training would give. All numbers come "
    "from the files of the run.</p>"
)
