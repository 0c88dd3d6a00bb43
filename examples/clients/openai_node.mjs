// Images through OpenAI's client for Node.js: npm install openai
// Start a server with `altdiff serve` first; ALTDIFF_URL and ALTDIFF_API_KEY say where it is and what its key is.
import { writeFile, readFile } from "node:fs/promises";
import OpenAI, { toFile } from "openai";

const url = process.env.ALTDIFF_URL ?? "http://127.0.0.1:7860";
const client = new OpenAI({ baseURL: `${url}/v1`, apiKey: process.env.ALTDIFF_API_KEY ?? "none" });

// seed and steps are options of ours
const answer = await client.images.generate({ prompt: "自転車、黄色の背景", seed: 7, steps: 12, response_format: "b64_json" });
await writeFile("bicycle.png", Buffer.from(answer.data[0].b64_json, "base64"));

const events = await client.images.generate({ prompt: "sunflower", stream: true, partial_images: 1 });
for await (const event of events) {
  console.log(event.type);
  if (event.type === "image_generation.completed") {
    await writeFile("sunflower.png", Buffer.from(event.b64_json, "base64"));
  }
}

const image = await toFile(await readFile("bicycle.png"), "bicycle.png", { type: "image/png" });
const near = await client.images.createVariation({ image, response_format: "b64_json" });
await writeFile("near.png", Buffer.from(near.data[0].b64_json, "base64"));
