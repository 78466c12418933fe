import { useRef } from "preact/hooks";
import { apiKey, asksForKey, enterKey, loadModels, serverFault } from "../chat/store";
import { Dialog } from "./dialog";

/** Stands in place of the start where the server gave no models. */
export function Gate() {
  const fault = serverFault.value;
  if (!fault) return null;
  return (
    <section class="opening" role="alert">
      <h1>The book is closed.</h1>
      <p class="lead">{fault.message}</p>
      <button type="button" class="button button-main" onClick={() => void loadModels()}>
        Try again
      </button>
    </section>
  );
}

/** Asks for an API key once the server has asked for one. */
export function KeyDialog() {
  const field = useRef<HTMLInputElement>(null);
  if (!asksForKey.value) return null;
  return (
    <Dialog title="API key" class="key" onClose={() => (asksForKey.value = false)}>
      <form
        onSubmit={(event) => {
          event.preventDefault();
          void enterKey(field.current?.value.trim() ?? "");
        }}
      >
        <p>
          {apiKey.value ? "The server does not take this key." : "This server asks for a key."} It is kept in this
          browser, and sent to this server only.
        </p>
        <input ref={field} type="password" aria-label="API key" autoComplete="off" required />
        <div class="row">
          <button type="submit" class="button button-main">
            Enter
          </button>
        </div>
      </form>
    </Dialog>
  );
}
