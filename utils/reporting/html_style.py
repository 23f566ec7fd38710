"""Style and script of the report's page."""


STYLE = """
:root{color-scheme:light dark;--bg:#fff;--fg:#1c2127;--soft:#5e6873;--line:#dfe3e8;--panel:#f6f7f9;
--c0:#2f6fde;--c1:#d9622b;--c2:#2a9d6a;--c3:#8a5cd1;--c4:#c23b6b;--c5:#8a7a1f}
@media(prefers-color-scheme:dark){:root{--bg:#15181c;--fg:#e4e7eb;--soft:#98a2ad;--line:#30363d;--panel:#1d2126;
--c0:#6ea2ff;--c1:#f0905e;--c2:#58c796;--c3:#b592f0;--c4:#ea7aa3;--c5:#cdbb55}}
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--fg);font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
header,main{max-width:1240px;margin:0 auto;padding:0 20px}
header{padding-top:28px}main{padding-bottom:60px}
h1{font-size:1.6rem;line-height:1.25;margin:0;overflow-wrap:anywhere}
h2{font-size:1.2rem;margin:36px 0 12px;padding-top:14px;border-top:1px solid var(--line);overflow-wrap:anywhere}
h3{font-size:1rem;margin:18px 0 8px}
p{margin:8px 0}.soft{color:var(--soft);font-size:.87rem;overflow-wrap:anywhere}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(124px,1fr));gap:10px;margin:20px 0}
.tile{background:var(--panel);border-radius:8px;padding:10px 14px}.tile b{display:block;font-size:1.05rem}
.tile span{color:var(--soft);font-size:.85rem}
.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,440px),1fr));gap:22px 28px;align-items:start}
.charts>*{min-width:0}.row{grid-column:1/-1}
figure{margin:0}figcaption{display:flex;flex-wrap:wrap;gap:2px 14px;align-items:baseline}
svg{display:block;width:100%;height:auto;max-width:100%}
.wide{overflow-x:auto}.wide svg{max-width:none}
svg *{stroke-linejoin:round;stroke-linecap:butt;font-family:system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
.scroll{overflow-x:auto}.tall{max-height:480px;overflow:auto;border:1px solid var(--line);border-radius:8px}
.tall .scroll{overflow-x:visible}.tall thead th{position:sticky;top:0;background:var(--panel)}
table{border-collapse:collapse;font-size:.9rem;min-width:min(100%,320px)}.tall table{width:100%}
th,td{padding:4px 12px 4px 8px;text-align:left;vertical-align:top;border-bottom:1px solid var(--line);overflow-wrap:anywhere}
th{font-weight:600;color:var(--soft);white-space:nowrap}td:first-child{min-width:110px}td:nth-child(2):not(:last-child){min-width:96px}
.num{text-align:right;white-space:nowrap;font-variant-numeric:tabular-nums}
.sortable th{cursor:pointer}.sortable th:hover{color:var(--fg)}
details{margin:12px 0}summary{cursor:pointer;font-weight:600}
.cards{display:grid;grid-template-columns:repeat(auto-fill,minmax(150px,1fr));gap:14px}
.card{background:var(--panel);border-radius:8px;overflow:hidden;font-size:.85rem}
.card img,.blank{display:block;width:100%;height:120px;object-fit:contain;background:var(--line);image-rendering:auto}
.blank{color:var(--soft);text-align:center;line-height:120px}
.card figcaption{flex-direction:column;gap:0;padding:8px 10px;overflow-wrap:anywhere}
.path{color:var(--soft);font-size:.75rem}
@media(max-width:480px){header,main{padding-left:12px;padding-right:12px}.cards{grid-template-columns:repeat(2,1fr)}}
@media print{.tall{max-height:none}}
"""

# A click on a column's head sorts by it, once more the other way round.
SCRIPT = """
for (const table of document.querySelectorAll("table.sortable"))
  table.tHead.rows[0].querySelectorAll("th").forEach((head, column) => {
    let rising = false;
    head.addEventListener("click", () => {
      rising = !rising;
      const value = row => row.cells[column].dataset.sort ?? row.cells[column].textContent;
      const order = (a, b) => { const x = value(a), y = value(b);
        return (isNaN(x) || isNaN(y) ? x.localeCompare(y) : x - y) * (rising ? 1 : -1); };
      table.tBodies[0].append(...[...table.tBodies[0].rows].sort(order));
    });
  });
"""
