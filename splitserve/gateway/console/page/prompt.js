// The prompt box: sends one request, shows its answer as it comes, then where its time went.

import { Refused, generate } from "./api.js";
import { byId, setOptions, setText } from "./dom.js";
import { count, seconds } from "./format.js";
import { timeline } from "./timeline.js";

export class PromptBox {
  // `unauthorised` is called with the sentence of a refusal that a key would mend.
  constructor(unauthorised) {
    this.unauthorised = unauthorised;
    this.classes = [];
    this.aborter = null;
    byId("prompt-form").addEventListener("submit", (event) => {
      event.preventDefault();
      this.#send();
    });
    byId("prompt").addEventListener("keydown", (event) => {
      if (event.key !== "Enter" || !(event.ctrlKey || event.metaKey)) return;
      event.preventDefault();
      byId("prompt-form").requestSubmit();
    });
    byId("stop").addEventListener("click", () => this.aborter?.abort());
  }

  show(classes) {
    const first = this.classes.length === 0;
    this.classes = classes;
    const choice = byId("prompt-class");
    setOptions(choice, classes.map((each) => each.name));
    if (first && classes.some((each) => each.name === "standard")) choice.value = "standard";
  }

  async #send() {
    if (this.aborter) return;
    this.aborter = new AbortController();
    const asked = {
      mode: byId("mode").value,
      prompt: byId("prompt").value,
      maxTokens: byId("max-tokens").valueAsNumber,
      temperature: byId("temperature").valueAsNumber,
      sloClass: byId("prompt-class").value,
    };
    this.#busy(true);
    setText(byId("answer"), "");
    byId("answer").hidden = false;
    byId("timeline").replaceChildren();
    try {
      await this.#stream(asked);
    } catch (error) {
      this.#failed(error);
    } finally {
      this.aborter = null;
      this.#busy(false);
    }
  }

  async #stream(asked) {
    const began = performance.now();
    const [answer, note, arrivals] = [byId("answer"), byId("prompt-note"), []];
    const usage = { tokens: 0, promptTokens: 0 };
    let timings = null;
    setText(note, "Sent; no token yet.");
    for await (const heard of generate(asked, this.aborter.signal)) {
      if (heard.id !== undefined) continue;
      if ((heard.tokens ?? 0) > usage.tokens) arrivals.push(performance.now() / 1000);
      Object.assign(usage, { tokens: heard.tokens ?? usage.tokens, promptTokens: heard.promptTokens ?? usage.promptTokens });
      if (heard.reasoning || heard.text) answer.append(heard.reasoning + heard.text);
      if (heard.timings) timings = heard.timings;
      setText(note, `${count(usage.tokens)} tokens`);
    }
    const took = (performance.now() - began) / 1000;
    setText(note, `${count(usage.tokens)} tokens in ${seconds(took)}, as this page saw it.`);
    if (timings) byId("timeline").append(timeline(timings, arrivals, usage, this.#objective(asked, usage)));
  }

  #objective(asked, usage) {
    const of = this.classes.find((each) => each.name === asked.sloClass);
    return of && of.ttft_s !== null ? of.ttft_s + of.ttft_per_token_s * usage.promptTokens : null;
  }

  #failed(error) {
    if (error.name === "AbortError") {
      setText(byId("prompt-note"), "Stopped. The request was cancelled.");
      return;
    }
    if (!(error instanceof Refused)) {
      setText(byId("prompt-note"), "The stream broke off before its end.");
      return;
    }
    setText(byId("prompt-note"), `Not served: ${error.message}`);
    if (error.status === 401) this.unauthorised(error.message);
  }

  #busy(is) {
    byId("send").disabled = is;
    byId("stop").hidden = !is;
    byId("prompt-form").setAttribute("aria-busy", String(is));
  }
}
