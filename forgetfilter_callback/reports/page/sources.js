// The table by source.

let sourceSort = { key: "removed", descending: true };

function sourceCounts(name, numbers) {
  return { name, ...numbers, kept: numbers.rows - numbers.removed, percent: (100 * numbers.removed) / numbers.rows };
}

function countSources(removed) {
  const removedOf = data.sampled ? sources.removed : sources.names.map(() => 0);
  if (!data.sampled) sources.of_samples.forEach((source, i) => { removedOf[source] += removed[i]; });
  return sources.names.map((name, i) => sourceCounts(name, {
    rows: sources.rows[i], seen: sources.seen?.[i], found: sources.unsafe_found[i], labeled: sources.unsafe_labeled[i], removed: removedOf[i],
  }));
}

function showSources(removed) {
  const listed = countSources(removed), grouped = sources.grouped ? [listed.pop()] : [];
  listed.sort((a, b) => b.removed - a.removed || b.rows - a.rows);
  const others = [...listed.slice(MAX_LISTED_SOURCES), ...grouped], lastRow = [];
  if (others.length > 1 || grouped.length) {
    const sum = (key) => others.reduce((total, each) => total + each[key], 0);
    const number = others.length - grouped.length + sources.grouped;
    listed.splice(MAX_LISTED_SOURCES);
    lastRow.push(sourceCounts(`${count(number)} more sources`, {
      rows: sum("rows"), seen: sum("seen"), found: sum("found"), labeled: sum("labeled"), removed: sum("removed"),
    }));
  }
  if (sourceSort.key !== "removed" || !sourceSort.descending) {
    listed.sort((a, b) => (sourceSort.descending ? -1 : 1) * compare(a[sourceSort.key], b[sourceSort.key]));
  }
  $("sources").replaceChildren();
  for (const each of [...listed, ...lastRow]) {
    const tr = $("sources").insertRow();
    cell(tr, "Source", "source").textContent = each.name;
    const cells = [["Rows", each.rows]];
    if (sources.seen !== null) cells.push(["Seen", each.seen], ["Found unsafe", each.found]);
    if (unsafe !== null) cells.push(["Labeled unsafe", each.labeled]);
    cells.push(["Kept", each.kept], ["Removed", each.removed]);
    for (const [label, number] of cells) cell(tr, label, "number").textContent = count(number);
    const share = cell(tr, "% removed", "number share");
    share.textContent = format(each.percent, 1);
    share.style.setProperty("--share", each.percent);
  }
  showSorted("sourceSort", sourceSort);
}
