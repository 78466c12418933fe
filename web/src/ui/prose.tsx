import type { Token } from "marked";
import { useLayoutEffect, useMemo, useRef } from "preact/hooks";
import { blocksOf, layOut } from "../text/markdown";
import { setMaths } from "../text/maths";
import { copyFrom } from "./clipboard";

/** A text in markdown. */
export function Prose({ text }: { text: string }) {
  const blocks = useMemo(() => blocksOf(text), [text]);
  return (
    // biome-ignore lint/a11y/useKeyWithClickEvents: what is clicked are buttons, which the keyboard presses as well
    // biome-ignore lint/a11y/noStaticElementInteractions: one listener for the buttons of all blocks of code
    <div class="prose" onClick={copyCode}>
      {blocks.map((block, index) => (
        <Block key={index} block={block} />
      ))}
    </div>
  );
}

function Block({ block }: { block: Token }) {
  const place = useRef<HTMLDivElement>(null);
  useLayoutEffect(() => {
    const fragment = layOut(block);
    void setMaths(fragment);
    place.current?.replaceChildren(fragment);
  }, [block.raw]);
  return <div class="block" ref={place} />;
}

function copyCode({ target }: MouseEvent): void {
  const button = (target as Element).closest<HTMLButtonElement>(".code-copy");
  const code = button?.closest(".code")?.querySelector("pre")?.textContent;
  if (button && code) void copyFrom(button, code);
}
