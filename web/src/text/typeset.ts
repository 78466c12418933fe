// KaTeX, in a file of its own because it is large and few answers need it.
import "katex/dist/katex.min.css";
import katex, { type KatexOptions } from "katex";

interface MathsNode {
  children?: MathsNode[];
  attributes?: Record<string, string>;
  toNode(): Node & Partial<ElementCSSInlineStyle>;
}

/** Puts a formula into an element. */
export function typeset(tex: string, element: HTMLElement, options: KatexOptions): void {
  const tree = (
    katex as unknown as { __renderToDomTree(tex: string, options: KatexOptions): MathsNode }
  ).__renderToDomTree(tex, options);
  styleByScript(tree);
  element.replaceChildren(tree.toNode());
}

/**
 * KaTeX writes a few styles as attributes, which the page's policy forbids; as properties, set by this script, they may
 * stand.
 */
function styleByScript(node: MathsNode): void {
  const style = node.attributes?.style;
  if (node.attributes && style !== undefined) {
    delete node.attributes.style;
    const toNode = node.toNode.bind(node);
    node.toNode = () => {
      const element = toNode();
      if (element.style) element.style.cssText = style;
      return element;
    };
  }
  node.children?.forEach(styleByScript);
}
