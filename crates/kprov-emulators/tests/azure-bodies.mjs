// Holds request bodies against the models of Microsoft's JavaScript clients.
//
// Usage: azure-bodies.mjs DIRECTORY < BODIES
//
// DIRECTORY has node_modules with @azure/arm-compute and @azure/arm-network whose releases still carry `mappers.js`; BODIES is
// a JSON list of {call, path, body}. Prints one line for each key that no model has, each required one that is missing, each
// value of the wrong type or out of its range; and last, as JSON, how many bodies were looked at and how many problems there are.

import { readFileSync } from "node:fs";
import { join } from "node:path";
import { createRequire } from "node:module";

const modules = join(process.argv[2], "node_modules", "@azure");
const require = createRequire(import.meta.url);
const compute = require(join(modules, "arm-compute/dist/commonjs/models/mappers.js"));
// This package's models are a module, and its package.json doesn't say so.
const text = readFileSync(join(modules, "arm-network/dist-esm/src/models/mappers.js"));
const network = await import(`data:text/javascript;base64,${text.toString("base64")}`);

const MODELS = {
  "PUT virtualMachines": [compute, "VirtualMachine"],
  "PATCH virtualMachines": [compute, "VirtualMachineUpdate"],
  "PUT disks": [compute, "Disk"],
  "PATCH disks": [compute, "DiskUpdate"],
  "PUT virtualNetworks": [network, "VirtualNetwork"],
  "PATCH virtualNetworks": [network, "TagsObject"],
  "PUT virtualNetworks/subnets": [network, "Subnet"],
  "PUT networkSecurityGroups": [network, "NetworkSecurityGroup"],
  "PATCH networkSecurityGroups": [network, "TagsObject"],
  "PUT publicIPAddresses": [network, "PublicIPAddress"],
  "PATCH publicIPAddresses": [network, "TagsObject"],
  "PUT natGateways": [network, "NatGateway"],
  "PATCH natGateways": [network, "TagsObject"],
  "PUT loadBalancers": [network, "LoadBalancer"],
  "PATCH loadBalancers": [network, "TagsObject"],
  "PUT networkInterfaces": [network, "NetworkInterface"],
  "PATCH networkInterfaces": [network, "TagsObject"],
};
// Resource groups are in another package: their bodies are counted and not looked at.
const ELSEWHERE = new Set(["PUT resourceGroups", "PATCH resourceGroups"]);

const problems = [];
let place = "";
const problem = (path, what) => problems.push(`${place}: ${path || "the body"} ${what}`);

/** A model's properties as a tree: `properties.addressSpace` becomes two levels. */
function tree(space, name) {
  const root = {};
  const model = space[name];
  if (!model) throw new Error(`no model ${name}`);
  for (const mapper of Object.values(model.type.modelProperties ?? {})) {
    const parts = (mapper.serializedName ?? "").match(/(?:\\.|[^.\\])+/g)?.map((p) => p.replaceAll("\\.", ".")) ?? [];
    let level = root;
    for (const [index, part] of parts.entries()) {
      level[part] ??= { inner: {} };
      if (index === parts.length - 1) level[part].mapper = mapper;
      level = level[part].inner;
    }
  }
  return root;
}

function checkLevel(space, level, value, path) {
  if (typeof value !== "object" || value === null || Array.isArray(value)) {
    problem(path, "has to be an object");
    return;
  }
  for (const key of Object.keys(value)) {
    if (!(key in level)) problem(path ? `${path}.${key}` : key, "is in no model");
  }
  for (const [key, { mapper, inner }] of Object.entries(level)) {
    const at = path ? `${path}.${key}` : key;
    const there = key in value && value[key] !== null;
    if (mapper?.required && !mapper.readOnly && !there) problem(at, "is required");
    if (!there) continue;
    if (mapper) check(space, mapper, value[key], at);
    else checkLevel(space, inner, value[key], at);
  }
}

function check(space, mapper, value, path) {
  const type = mapper.type;
  const wrong = (want) => problem(path, `has to be ${want}, and is ${JSON.stringify(value)}`);
  switch (type.name) {
    case "Composite":
      checkLevel(space, tree(space, type.className), value, path);
      break;
    case "Sequence":
      if (!Array.isArray(value)) return wrong("a list");
      value.forEach((item, index) => check(space, type.element, item, `${path}[${index}]`));
      break;
    case "Dictionary":
      if (typeof value !== "object") return wrong("an object");
      for (const [key, item] of Object.entries(value)) check(space, type.value, item, `${path}.${key}`);
      break;
    case "String":
    case "DateTime":
    case "Uuid":
      if (typeof value !== "string") return wrong("a string");
      break;
    case "Number":
      if (typeof value !== "number") return wrong("a number");
      break;
    case "Boolean":
      if (typeof value !== "boolean") return wrong("true or false");
      break;
    case "Enum":
      if (!type.allowedValues.includes(value)) return wrong(`one of ${type.allowedValues.join(", ")}`);
      break;
    case "any":
    case "Object":
      break;
    default:
      problem(path, `has a type this doesn't know: ${type.name}`);
  }
  const limits = mapper.constraints ?? {};
  if (limits.InclusiveMinimum !== undefined && value < limits.InclusiveMinimum) wrong(`at least ${limits.InclusiveMinimum}`);
  if (limits.InclusiveMaximum !== undefined && value > limits.InclusiveMaximum) wrong(`at most ${limits.InclusiveMaximum}`);
  if (limits.MaxLength !== undefined && value.length > limits.MaxLength) wrong(`of ${limits.MaxLength} characters at most`);
}

const bodies = JSON.parse(readFileSync(0, "utf8"));
let checked = 0;
for (const { call, path, body } of bodies) {
  place = `${call} ${path.split("/").at(-1)}`;
  if (ELSEWHERE.has(call)) continue;
  const model = MODELS[call];
  if (!model) {
    problem("", "belongs to a call without a model");
    continue;
  }
  checked += 1;
  checkLevel(model[0], tree(...model), body, "");
}
for (const line of problems) console.log(line);
console.log(JSON.stringify({ checked, problems: problems.length }));
