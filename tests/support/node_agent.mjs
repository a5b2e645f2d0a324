// An agent program in another language, by what node brings along: two calls, of which the second goes on from the first.
const { OPENAI_BASE_URL: base, OPENAI_API_KEY: key, LATENT_CONTROL_SESSION: session } = process.env;

async function post(path, body) {
  const headers = { authorization: `Bearer ${key}`, "content-type": "application/json" };
  const reply = await fetch(`${base}/${path}`, { method: "POST", headers, body: JSON.stringify(body) });
  if (!reply.ok) throw new Error(await reply.text());
  return reply.json();
}

const messages = [{ role: "user", content: "room 1" }];
const first = await post("chat/completions", { model: "policy", messages });
messages.push(first.choices[0].message, { role: "user", content: "room 2" });
await post("chat/completions", { model: "policy", messages });
await post(`sessions/${session}/reward`, { reward: 0.5, success: true });
