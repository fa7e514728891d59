// Validates custom resources: a JSON list of them on stdin, a JSON list of what is wrong with each ("" for nothing) on
// stdout. The validators come from the resources' own CRDs (npm, @kubernetes-models).
import { pathToFileURL } from "node:url";

const PACKAGES = {
  "monitoring.coreos.com": "prometheus-operator",
  "gateway.networking.k8s.io": "gateway-api",
  "keda.sh": "keda",
  "cert-manager.io": "cert-manager",
};
const modules = `${process.argv[2]}/node_modules/@kubernetes-models`;

let text = "";
for await (const chunk of process.stdin) text += chunk;
const answers = [];
for (const document of JSON.parse(text)) {
  const name = PACKAGES[document.apiVersion.split("/")[0]];
  const file = `${modules}/${name}/${document.apiVersion}/${document.kind}.js`;
  const Model = (await import(pathToFileURL(file)))[document.kind];
  try {
    new Model(document).validate();
    answers.push("");
  } catch (error) {
    answers.push(error.message);
  }
}
process.stdout.write(JSON.stringify(answers));
