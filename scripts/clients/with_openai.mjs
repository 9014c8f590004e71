// Sends every kind of request with OpenAI's client for Node: `SERVER=http://127.0.0.1:8000 KEY=… node with_openai.mjs`
// in a folder where `npm install openai` was run. with_openai_page.py runs `everyColumn` in a web page.
import OpenAI, { toFile } from "openai";
import { VERSION } from "openai/version";
import { ClientReport, cancels, check, hole, isPng, key, prompt, refused, server } from "./cells.mjs";

const small = { prompt, size: "256x256" };
const long = { ...small, n: 4, num_inference_steps: 100 };
const bytesOf = (base64) => Uint8Array.from(atob(base64), (letter) => letter.charCodeAt(0));

// `follows`: whether /metrics can be read from where this runs, so that a cancelled request can be seen.
export async function everyColumn(client, report, follows) {
  await report.cell("connect", () => client.models.list());
  await report.cell("list", async () => {
    const names = (await client.models.list()).data.map((model) => model.id);
    check(names.includes("sdxl") && names.includes("flux"), "sdxl and flux are listed");
    check((await client.models.retrieve("flux")).id === "flux", "flux is described");
  });
  let picture;
  for (const model of ["dall-e-3", "gpt-image-1", "gpt-image-2", "chatgpt-image-latest", "sdxl"])
    await report.cell("draw", async () => {
      const { data } = await client.images.generate({ model, ...small });
      const image = data[0].b64_json ? null : await (await fetch(data[0].url)).arrayBuffer();
      check(image ? image.byteLength > 100 : isPng(data[0].b64_json), `${model} answers an image`);
      picture = data[0].b64_json ?? picture;
    });
  await report.cell("draw", async () => {
    const { data } = await client.images.generate({ ...small, n: 3, background: "transparent", output_compression: 100 });
    check(new Set(data.map((one) => one.seed)).size === 3, "three images have three seeds");
  });
  await report.cell("edit", async () => {
    const image = await toFile(bytesOf(picture), "a.png", { type: "image/png" });
    const { data } = await client.images.edit({ image, prompt: "a yellow circle" });
    check(isPng(data[0].b64_json), "an edit answers b64_json");
  });
  await report.cell("edit", async () => {
    const image = [await toFile(bytesOf(picture), "a.png"), await toFile(bytesOf(picture), "b.png")];
    await client.images.edit({ model: "gpt-image-2", image, prompt: "a yellow circle", size: "auto" });
  });
  await report.cell("edit", async () => {
    const [image, mask] = [await toFile(bytesOf(picture), "a.png"), await toFile(bytesOf(hole), "m.png")];
    await client.images.edit({ model: "dall-e-2", image, mask, prompt: "a yellow square", n: 2 });
  });
  await report.cell("edit", async () => {
    const { data } = await client.images.createVariation({ image: await toFile(bytesOf(picture), "a.png"), n: 2 });
    check(data.length === 2, "two variations");
  });
  await report.cell("progress", async () => {
    const types = [];
    const stream = await client.images.generate({ ...small, stream: true, partial_images: 2, num_inference_steps: 100 });
    for await (const event of stream) types.push(event.type);
    check(types[0] === "image_generation.partial_image", "partial images come first");
    check(types.at(-1) === "image_generation.completed", "the last event is the image");
  });
  if (follows) await report.cell("cancel", () => cancels((signal) => client.images.generate(long, { signal })));
  else
    await report.cell("cancel", async () => {
      const abort = new AbortController();
      setTimeout(() => abort.abort(), 300);
      await refused(
        () => client.images.generate(long, { signal: abort.signal }),
        (error) => (error instanceof OpenAI.APIUserAbortError ? "" : `the error is ${error.name}`),
      );
    });
  await report.cell("errors", () =>
    refused(() => client.images.generate({ ...small, size: "huge" }), (error) =>
      error instanceof OpenAI.BadRequestError && error.param === "size" ? "" : `${error.status} ${error.param}`,
    ),
  );
  await report.cell("errors", () =>
    refused(() => client.images.generate({ ...small, model: "nonesuch" }), (error) =>
      error.code === "model_not_found" ? "" : `${error.status} ${error.code}`,
    ),
  );
}

if (globalThis.process?.argv) {
  const client = new OpenAI({ baseURL: `${server}/v1`, apiKey: key, maxRetries: 0 });
  await everyColumn(client, new ClientReport(`openai (Node) ${VERSION}`), true);
}
