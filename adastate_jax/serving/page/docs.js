// Shows the OpenAPI and AsyncAPI documents as text.

import { headers } from "/page/session.js";

function entry(place, title, text, fields = []) {
  const section = document.createElement("details");
  const summary = document.createElement("summary");
  const name = document.createElement("code");
  name.textContent = title;
  summary.append(name, ` ${text ?? ""}`);
  section.append(summary);
  const list = document.createElement("ul");
  for (const field of fields) {
    const item = document.createElement("li");
    item.textContent = field;
    list.append(item);
  }
  section.append(list);
  document.getElementById(place).append(section);
}

const load = async (path) => (await fetch(path, { headers: headers() })).json();
const [routes, socket] = await Promise.all([load("/openapi.json"), load("/asyncapi.json")]);
for (const [path, methods] of Object.entries(routes.paths)) {
  for (const [method, { description, parameters = [] }] of Object.entries(methods)) {
    entry("routes", `${method.toUpperCase()} ${path}`, description, parameters.map(({ name, in: where }) => `${name} (${where})`));
  }
}
for (const [place, operation] of [["say", "say"], ["hear", "hear"]]) {
  for (const { $ref } of socket.operations[operation].messages) {
    const message = socket.components.messages[$ref.split("/").at(-1)];
    const schema = message.payload && socket.components.schemas[message.payload.$ref.split("/").at(-1)];
    const fields = Object.entries(schema?.properties ?? {}).map(([name, { description, type, const: value, default: usual }]) =>
      [name, value ?? type ?? "", usual === undefined ? "" : `default ${JSON.stringify(usual)}`, description ?? ""].filter(Boolean).join(", "));
    entry(place, message.title, message.summary, fields);
  }
}
