// The official Node client against a running ingress: node check.mjs BASE_URL MODEL MODE
import OpenAI from "openai";

const [baseURL, model, mode] = process.argv.slice(2);
const client = new OpenAI({ baseURL, apiKey: "none", maxRetries: 0 });
const slow = mode === "deadline"; // an answer that cannot be finished in time: the stream has to end with a typed error
const messages = [{ role: "user", content: slow ? "Count to 1000." : "Count to 20." }];
const extra = slow ? { ignore_eos: true, max_tokens: 3900 } : {};
const options = slow ? { headers: { "x-request-timeout-ms": "1000" } } : {};
const result = { text: "", error: null };
try {
  if (mode === "plain") {
    const answer = await client.chat.completions.create({ model, messages, temperature: 0 });
    result.text = answer.choices[0].message.content;
  } else {
    const stream = await client.chat.completions.create({ model, messages, temperature: 0, stream: true, ...extra }, options);
    for await (const chunk of stream) result.text += chunk.choices[0]?.delta?.content ?? "";
  }
} catch (error) {
  result.error = { name: error.constructor.name, status: error.status ?? null, code: error.code ?? null, message: error.message };
}
console.log(JSON.stringify(result));
