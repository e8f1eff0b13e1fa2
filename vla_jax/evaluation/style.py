"""The look of a report."""

CSS = """
:root { --ink: #1f2430; --quiet: #6b7280; --line: #e5e7eb; --paper: #ffffff; --wash: #f7f8fa; --accent: #2f6fdf; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1080px; padding: 40px 24px 80px; background: var(--paper); color: var(--ink);
       font: 15px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, Helvetica, Arial, sans-serif; }
header { border-bottom: 3px solid var(--accent); padding-bottom: 12px; margin-bottom: 8px; }
h1 { font-size: 28px; line-height: 1.2; margin: 0 0 8px; letter-spacing: -0.01em; }
h2 { font-size: 19px; margin: 40px 0 12px; }
p { margin: 4px 0; }
.quiet, small { color: var(--quiet); }
small { display: block; font-weight: 400; font-size: 12px; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: 8px 14px 8px 0; border-bottom: 1px solid var(--line); vertical-align: top; }
thead th { color: var(--quiet); font-size: 13px; border-bottom: 2px solid var(--line); }
tbody th { font-weight: 600; }
.sure { font-weight: 700; }
figure { margin: 20px 0; overflow-x: auto; }
figure svg { max-width: 100%; height: auto; }
figcaption { font-size: 13px; margin-bottom: 6px; }
.films { display: flex; flex-wrap: wrap; gap: 20px; }
.films figure { margin: 0; }
video { display: block; max-width: 100%; border: 1px solid var(--line); border-radius: 6px; }
details { border: 1px solid var(--line); border-radius: 6px; margin: 8px 0; background: var(--wash); }
summary { cursor: pointer; padding: 8px 14px; font-weight: 600; }
pre { margin: 0; padding: 4px 14px 14px; overflow-x: auto; font: 12px/1.5 ui-monospace, Menlo, Consolas, monospace; }
@media print { .films, details { break-inside: avoid; } }
"""
