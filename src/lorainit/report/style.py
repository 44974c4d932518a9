"""How the page looks, by day and by night."""

STYLE = """
:root{--paper:#fbfaf7;--card:#fff;--ink:#1f2328;--soft:#5d6670;--line:#dfe2e5;--heat:#0b7a75;
--on:#fff;--warn:#b54708;--good:#16743b;color-scheme:light dark}
@media(prefers-color-scheme:dark){:root{--paper:#15181c;--card:#1d2126;--ink:#e6e8ea;--soft:#9aa4ae;
--line:#343a41;--heat:#3fb8ae;--on:#0d1413;--warn:#f0a35e;--good:#6ccf8e}}
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);font:16px/1.5 system-ui,sans-serif}
main{max-width:1080px;margin:0 auto;padding:24px 16px 64px}
h1{font-size:1.6rem;margin:0 0 4px}h2{font-size:1.15rem;margin:36px 0 4px}h3{font-size:.9rem;margin:0}
p{margin:4px 0 12px;max-width:70ch}.soft,.none{color:var(--soft)}.none{font-size:.85rem}
.facts{display:flex;flex-wrap:wrap;gap:8px 24px;margin:14px 0 0;padding:0}
.facts div{min-width:90px}.facts dt{color:var(--soft);font-size:.8rem}.facts dd{margin:0;font-weight:600}
.advice{list-style:none;padding:0;margin:12px 0}
.advice li{background:var(--card);border:1px solid var(--line);border-left:4px solid var(--soft);
border-radius:4px;padding:8px 12px;margin:8px 0;overflow-wrap:anywhere}
.advice .warn{border-left-color:var(--warn)}.advice .good{border-left-color:var(--good)}
ol.advice li{display:flex;gap:8px}ol.advice b{flex:0 0 4.8em;white-space:nowrap}
ol.advice span{min-width:0}.also{margin-top:20px}
code{font:.88em ui-monospace,monospace;background:var(--paper);border-radius:3px;padding:1px 3px}
.card{background:var(--card);border:1px solid var(--line);border-radius:6px;padding:12px}
.fit{width:fit-content;max-width:100%}
.grid3{display:grid;grid-template-columns:repeat(auto-fit,minmax(260px,1fr));gap:12px}
.pair{display:flex;flex-wrap:wrap;gap:12px}.pair h3{margin:0 0 8px}
.scroll{overflow-x:auto}svg{width:100%;height:auto;display:block}.fit svg{width:auto}
svg text{font:11px system-ui,sans-serif;fill:var(--ink)}svg .axis{fill:var(--soft)}
svg .on{fill:var(--on)}.cell{fill:var(--heat)}
polyline{fill:none}.faint{stroke:var(--heat);stroke-opacity:.22;stroke-width:.7}
.strong{stroke:var(--ink);stroke-width:1.6}line.grid{stroke:var(--line)}
.rank{stroke:var(--warn);stroke-width:1.5;stroke-dasharray:4 3}svg .mark{fill:var(--warn)}
.grid2{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,400px),1fr));gap:12px}
.legend{display:flex;flex-wrap:wrap;gap:4px 18px;margin:0 0 8px;font-size:.85rem}
.legend i{display:inline-block;width:14px;height:3px;border-radius:2px;margin:0 6px 3px 0;background:var(--c)}
.c0{--c:#0b7a75}.c1{--c:#c2410c}.c2{--c:#6d4bc3}.c3{--c:#a16207}
.c4{--c:#be185d}.c5{--c:#2563eb}.c6{--c:#4d7c0f}.c7{--c:#6b7280}
@media(prefers-color-scheme:dark){.c0{--c:#3fb8ae}.c1{--c:#fb923c}.c2{--c:#a78bfa}.c3{--c:#e5c04b}
.c4{--c:#f472b6}.c5{--c:#60a5fa}.c6{--c:#a3d65c}.c7{--c:#a8b0ba}}
.line{stroke:var(--c);stroke-width:2;stroke-linejoin:round}.noise{stroke-width:1;stroke-opacity:.25}
.dot{fill:var(--c)}.range{fill:var(--warn);fill-opacity:.12}
table.plain{width:auto}
table.plain td:first-child{white-space:normal;min-width:5.5em}
table.plain td,table.plain th{padding-right:22px}
table{border-collapse:collapse;font-size:.85rem;width:100%}
th,td{padding:4px 10px 4px 0;text-align:right;border-bottom:1px solid var(--line);white-space:nowrap}
th:first-child,td:first-child{text-align:left}th{color:var(--soft);font-weight:500}
@media(max-width:480px){main{padding:14px 12px 40px}h1{font-size:1.3rem;overflow-wrap:anywhere}
.card{padding:8px}ol.advice li{display:block}ol.advice b{display:block}.grid2 svg text{font-size:15px}
table.plain td,table.plain th{padding-right:12px}.facts{gap:6px 18px}.facts div{min-width:70px}}
summary{cursor:pointer;color:var(--soft)}
"""
