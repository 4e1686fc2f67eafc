(() => {
  const all = (selector, root = document) => [...root.querySelectorAll(selector)];

  // Tables: a click on a column's button sorts by the cells' data-value; what was not measured stays last.
  all("table[data-sortable]").forEach((table) => {
    const headers = all("thead th", table);
    headers.forEach((header, column) => {
      const button = header.querySelector("button");
      if (!button) return;
      button.addEventListener("click", () => {
        const up = header.getAttribute("aria-sort") !== "ascending";
        headers.forEach((other) => other.removeAttribute("aria-sort"));
        header.setAttribute("aria-sort", up ? "ascending" : "descending");
        const key = (row) => row.cells[column].dataset.value ?? "";
        const rows = all("tr", table.tBodies[0]).sort((a, b) => {
          const [x, y] = [key(a), key(b)];
          if (x === "" || y === "") return (x === "") - (y === "");
          const order = isNaN(x) || isNaN(y) ? x.localeCompare(y) : x - y;
          return up ? order : -order;
        });
        table.tBodies[0].append(...rows);
      });
    });
  });

  // Predictions: filter by what changed, a few at a time.
  const examples = all(".example");
  const more = document.querySelector(".more");
  if (more) {
    let wanted = "all", limit = 6;
    const draw = () => {
      const fitting = examples.filter((e) => wanted === "all" || wanted.split(" ").includes(e.dataset.change));
      examples.forEach((e) => (e.hidden = true));
      fitting.slice(0, limit).forEach((e) => (e.hidden = false));
      more.hidden = fitting.length <= limit;
      more.textContent = `Show more (${fitting.length - limit} left)`;
    };
    more.addEventListener("click", () => { limit += 12; draw(); });
    all(".filters button[data-change]").forEach((button) =>
      button.addEventListener("click", () => {
        all(".filters button[data-change]").forEach((b) => b.setAttribute("aria-pressed", b === button));
        [wanted, limit] = [button.dataset.change, 6];
        draw();
      }));
    draw();
  }

  // Comparison: one metric's plots at a time.
  const groups = all("[data-metric-group]");
  const choose = (name) => {
    groups.forEach((g) => (g.hidden = g.dataset.metricGroup !== name));
    all("[data-metric]").forEach((b) => b.setAttribute("aria-pressed", b.dataset.metric === name));
  };
  all("[data-metric]").forEach((b) => b.addEventListener("click", () => choose(b.dataset.metric)));
  if (groups.length > 1) choose(groups[0].dataset.metricGroup);

  // Curves: the values at the step under the pointer.
  const tip = document.getElementById("tip");
  all("svg[data-hover]").forEach((svg) => {
    const series = JSON.parse(svg.dataset.hover);
    const cross = svg.querySelector("path").cloneNode();
    cross.setAttribute("class", "cross");
    cross.removeAttribute("d");
    svg.append(cross);
    svg.addEventListener("pointermove", (event) => {
      const box = svg.getBoundingClientRect();
      const x = ((event.clientX - box.left) / box.width) * svg.viewBox.baseVal.width;
      const nearest = series.map((s) => [s.name, s.points.reduce((a, b) => (Math.abs(b[0] - x) < Math.abs(a[0] - x) ? b : a))]);
      const at = nearest[0][1];
      cross.setAttribute("d", `M${at[0]} 14V${svg.viewBox.baseVal.height - 34}`);
      tip.textContent = `step ${at[2]}\n` + nearest.map(([name, p]) => `${name} ${p[3]}`).join("\n");
      tip.style.opacity = 1;
      const left = event.clientX + 14 + tip.offsetWidth > innerWidth ? event.clientX - 14 - tip.offsetWidth : event.clientX + 14;
      tip.style.left = `${left}px`;
      tip.style.top = `${event.clientY - 14}px`;
    });
    svg.addEventListener("pointerleave", () => { tip.style.opacity = 0; cross.removeAttribute("d"); });
  });
})();
