// SPDX-License-Identifier: Apache-2.0
// "js_clients.mjs CLIENT FLAVOUR": as python_clients.py, for the libraries of JavaScript.
import { createRequire } from "node:module";
import { performance } from "node:perf_hooks";
import process from "node:process";

const load = createRequire(`${process.env.NODE_LIBRARIES}/`);

const CLIENTS = {
  "aws-sdk-js": () => {
    const { fromInstanceMetadata } = load("@aws-sdk/credential-providers");
    const { MetadataService } = load("@aws-sdk/ec2-metadata-service");
    return {
      secret: async () => (await fromInstanceMetadata()()).accessKeyId,
      place: () => new MetadataService({}).request("/latest/meta-data/placement/region", {}),
    };
  },
  "gcp-metadata": () => {
    const metadata = load("gcp-metadata");
    return {
      secret: async () => (await metadata.instance("service-accounts/default/token")).access_token,
      place: () => metadata.instance("zone"),
    };
  },
  "google-auth-library": () => {
    const { GoogleAuth } = load("google-auth-library");
    return { secret: () => new GoogleAuth().getAccessToken() };
  },
  "azure-identity-js": () => {
    const { ManagedIdentityCredential } = load("@azure/identity");
    return {
      secret: async () => (await new ManagedIdentityCredential().getToken("https://management.azure.com/.default")).token,
    };
  },
};

for (const [asked, question] of Object.entries(CLIENTS[process.argv[2]]())) {
  const begin = performance.now();
  let got = null;
  let said = "";
  try {
    got = await question();
  } catch (error) {
    said = `${error.name}: ${error.message}`;
  }
  const seconds = Math.round((performance.now() - begin) / 10) / 100;
  console.log(JSON.stringify({ asked, got, said, seconds }));
}
process.exit(0);
