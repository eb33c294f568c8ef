// The only ways in which this page makes nodes. Strings become text nodes: nothing that a server or a model says is
// ever parsed as HTML.

/** A new element; `properties` are DOM properties where the element has them, attributes otherwise. */
export function element(tag, properties = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name in node) node[name] = value;
    else node.setAttribute(name, value);
  }
  node.append(...children);
  return node;
}

/** A new SVG element; presentation attributes, unlike a style attribute, are within the page's CSP. */
export function svg(tag, attributes = {}, ...children) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

/** The element of index.html with this id. */
export function byId(id) {
  return document.getElementById(id);
}

/** Shows "42 ms" with its unit set smaller than its number. */
export function showQuantity(node, text) {
  const space = text.lastIndexOf(" ");
  if (space < 0) node.replaceChildren(text);
  else node.replaceChildren(text.slice(0, space), element("span", { className: "unit" }, text.slice(space)));
}
