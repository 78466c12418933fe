// What the server says, as far as the page reads it. The shapes are OpenAI's, with Openbook's own fields beside them.

/** What a model can do; the field `openbook` of an entry of `/v1/models`. */
export interface Abilities {
  max_model_len: number;
  is_base: boolean; // it continues texts, and holds no conversation
  has_thinking: boolean;
  has_tools: boolean;
  sees_images: boolean;
  efforts: string[];
  adapters: string[];
  profile: string;
  tasks: string[]; // what it was trained on; empty for models that are not Openbook's own
}

export interface ModelEntry {
  id: string;
  parent?: string | null; // the model that an adapter changes; such entries are no models of their own
  openbook: Abilities;
}

/** How likely a token was, in nats, and the likeliest ones in its place. */
export interface TokenLogprob {
  token: string;
  logprob: number;
  top_logprobs?: { token: string; logprob: number }[];
}

/** `/v1/completions` says the same in four lists. */
export interface CompletionLogprobs {
  tokens: string[];
  token_logprobs: (number | null)[];
  top_logprobs?: (Record<string, number> | null)[] | null;
}

export interface CallDelta {
  index?: number;
  id?: string;
  function?: { name?: string; arguments?: string };
}

export interface Usage {
  prompt_tokens: number;
  completion_tokens: number;
  prompt_tokens_details?: { cached_tokens?: number } | null;
  completion_tokens_details?: { reasoning_tokens?: number } | null;
}

/** Everything needed to compute an answer again; the page shows it and does not interpret it. */
export type Receipt = Record<string, unknown>;

export interface ChatLogprobs {
  content?: TokenLogprob[] | null;
  reasoning?: TokenLogprob[] | null; // those of the thinking
}

export interface Choice {
  text?: string; // of /v1/completions
  delta?: { content?: string | null; reasoning_content?: string | null; tool_calls?: CallDelta[] | null };
  logprobs?: ChatLogprobs | CompletionLogprobs | null;
  finish_reason?: string | null;
  receipt?: Receipt | null; // with the last part, where the profile allows one
}

export interface Chunk {
  choices?: Choice[];
  usage?: Usage | null;
  error?: { message?: string } | null;
}

export type ContentPart = { type: "text"; text: string } | { type: "image_url"; image_url: { url: string } };

export interface Message {
  role: "system" | "user" | "assistant";
  content: string | ContentPart[];
}
