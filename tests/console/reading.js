// What a page's reader meets, for a test: run in the page, returns complaints. By the rules of WCAG 2.2 AA that a script
// can check: names (4.1.2), labels (3.3.2), contrast of text (1.4.3), order of headings and focus (1.3.1, 2.4.3).
() => {
  const complaints = [];
  const visible = (element) => element.checkVisibility({ visibilityProperty: true }) && element.getClientRects().length > 0;
  const describe = (element) => `<${element.localName} id="${element.id}" class="${element.getAttribute("class") ?? ""}">`;

  const name = (element) => {
    const by = element.getAttribute("aria-labelledby");
    if (by) return by.split(" ").map((id) => document.getElementById(id)?.textContent ?? "").join(" ");
    const labels = [...(element.labels ?? [])].map((label) => label.textContent).join(" ");
    return element.getAttribute("aria-label") || labels || (/^(input|select|textarea)$/.test(element.localName) ? "" : element.textContent);
  };
  const named = "a, button, input, select, textarea, svg, meter, section, [role=region], [role=log], [tabindex='0']";
  for (const element of document.querySelectorAll(named)) {
    if (visible(element) && !name(element).trim()) complaints.push(`no name: ${describe(element)}`);
  }
  if (!document.documentElement.lang) complaints.push("the page says no language");
  const ids = [...document.querySelectorAll("[id]")].map((element) => element.id);
  if (new Set(ids).size !== ids.length) complaints.push("an id comes twice");
  if (document.querySelectorAll("main").length !== 1) complaints.push("there is not one main");

  let level = 0;
  for (const heading of document.querySelectorAll("h1, h2, h3")) {
    const own = Number(heading.localName[1]);
    if (own > level + 1) complaints.push(`heading out of order: ${heading.textContent}`);
    level = own;
  }
  for (const element of document.querySelectorAll("[tabindex]")) {
    if (element.tabIndex > 0) complaints.push(`focus out of order: ${describe(element)}`);
  }
  for (const cell of document.querySelectorAll("thead th")) {
    if (cell.scope !== "col") complaints.push(`a column's head without scope: ${cell.textContent}`);
  }

  const parts = (color) => (color.match(/[\d.]+/g) ?? []).map(Number);
  const over = ([r, g, b, a = 1], below) => [r, g, b].map((value, at) => value * a + below[at] * (1 - a));
  const background = (element) => {
    if (!element) return [255, 255, 255];
    const own = parts(getComputedStyle(element).backgroundColor);
    return own[3] === 0 ? background(element.parentElement) : over(own, own.length === 4 ? background(element.parentElement) : [0, 0, 0]);
  };
  const luminance = (color) => {
    const [r, g, b] = color.map((value) => ((value /= 255) <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement;
    if (!walker.currentNode.textContent.trim() || !visible(element) || element.closest("option, title, noscript, :disabled")) continue;
    const style = getComputedStyle(element);
    const below = background(element);
    const ink = over(parts(element.closest("svg") ? style.fill : style.color), below);
    const [light, dark] = [luminance(ink), luminance(below)].sort((a, b) => b - a);
    const contrast = (light + 0.05) / (dark + 0.05);
    if (contrast < 4.5) complaints.push(`contrast ${contrast.toFixed(2)}: "${walker.currentNode.textContent.trim().slice(0, 30)}" in ${describe(element)}`);
  }
  return [...new Set(complaints)];
};
