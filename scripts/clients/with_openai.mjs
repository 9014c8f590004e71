// Sends requests with OpenAI's client for Node: `SERVER=http://127.0.0.1:8000 KEY=… node with_openai.mjs`
// in a folder where `npm install openai` was run.
import OpenAI from "openai";

const client = new OpenAI({ baseURL: `${process.env.SERVER ?? "http://127.0.0.1:8000"}/v1`, apiKey: process.env.KEY ?? "none", maxRetries: 0 });
const prompt = "a green star on a yellow background";

const models = await client.models.list();
console.log("models:", models.data.map((model) => model.id).join(" "));
const byUrl = await client.images.generate({ model: "dall-e-3", prompt, size: "256x256", n: 2 });
console.log("generate, n=2:", byUrl.data.map((one) => `${one.seed} ${one.url.split("/files/")[1]}`).join(", "));
const byText = await client.images.generate({ model: "gpt-image-1", prompt, size: "256x256" });
console.log("generate, b64_json:", Buffer.from(byText.data[0].b64_json, "base64").subarray(1, 4).toString());
const stream = await client.images.generate({ prompt, size: "256x256", stream: true, partial_images: 1, seed: 9, num_inference_steps: 30 });
for await (const event of stream) console.log("stream:", event.type);
try {
  await client.images.generate({ prompt, size: "huge" });
} catch (error) {
  console.log("refused:", error.constructor.name, error.status, error.code, error.param);
}
