// A job with nothing but Node.js: asked for, watched while it is drawn, and fetched.
// Start a server with `altdiff serve` first; ALTDIFF_URL and ALTDIFF_API_KEY say where it is and what its key is.
import { writeFile } from "node:fs/promises";

const url = process.env.ALTDIFF_URL ?? "http://127.0.0.1:7860";
const headers = { "Content-Type": "application/json" };
if (process.env.ALTDIFF_API_KEY) headers.Authorization = `Bearer ${process.env.ALTDIFF_API_KEY}`;

const body = JSON.stringify({ prompt: "соняшник, фіолетове тло", steps: 12, images_per_prompt: 2 });
const accepted = await fetch(`${url}/api/jobs`, { method: "POST", headers, body });
if (!accepted.ok) throw new Error((await accepted.json()).error.message);
const job = await accepted.json();

let text = "";
const events = await fetch(url + job.links.events, { headers });
for await (const piece of events.body.pipeThrough(new TextDecoderStream())) {
  text += piece;
  const whole = text.split("\n\n");
  text = whole.pop();
  for (const event of whole) {
    const [, name, data] = event.match(/^event: (\w+)\ndata: (.*)$/s) ?? [];
    if (name === "step") console.log(`step ${JSON.parse(data).step}`);
    if (name === "image") {
      const image = JSON.parse(data);
      const file = await fetch(url + image.url, { headers });
      await writeFile(`job-${image.index}.png`, Buffer.from(await file.arrayBuffer()));
    }
  }
}
