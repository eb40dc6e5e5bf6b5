// Lists the paths of openapi.json.

const element = (kind, text) => Object.assign(document.createElement(kind), { textContent: text });
const { paths, components } = await (await fetch("/openapi.json")).json();
const place = document.getElementById("paths");
for (const [path, methods] of Object.entries(paths)) {
  for (const [method, about] of Object.entries(methods)) {
    const title = element("h2", "");
    title.append(element("code", `${method.toUpperCase()} ${path}`));
    place.append(title, element("p", about.summary + "."));
    const schema = about.requestBody?.content?.["application/json"]?.schema;
    const fields = Object.entries(schema?.properties || {}).map(([name, field]) => `${name} (${field.type || "optional"})`);
    if (fields.length) place.append(element("p", `Fields: ${fields.join(", ")}.`));
  }
}
place.append(element("h2", "WebSocket /v1/stream"), element("p", "The protocol causvid.v1 is in docs/serving.md."));
