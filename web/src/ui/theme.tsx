import { signal } from "@preact/signals";
import { remember, remembered } from "../chat/memory";
import { Icon } from "./icons";

const THEMES = ["system", "light", "dark"] as const;
type Theme = (typeof THEMES)[number];
const ICONS = { system: "system", light: "sun", dark: "moon" } as const;

// public/theme.js does the same with what was kept before the page is first painted.
const theme = signal<Theme>(remembered<Theme>("theme", "system"));

/** Goes from one theme to the next. */
export function ThemeButton() {
  const next = THEMES[(THEMES.indexOf(theme.value) + 1) % THEMES.length] ?? "system";
  const choose = () => {
    theme.value = next;
    remember("theme", next);
    if (next === "system") delete document.documentElement.dataset.theme;
    else document.documentElement.dataset.theme = next;
  };
  return (
    <button type="button" class="quiet" title={`Change to ${next}`} onClick={choose}>
      <Icon name={ICONS[theme.value]} /> Theme: {theme.value}
    </button>
  );
}
