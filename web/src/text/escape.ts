const NAMES: Record<string, string> = { "&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;", "'": "&#39;" };

/** A text as HTML that shows it, inside an element or an attribute. */
export const escapeHtml = (text: string): string => text.replace(/[&<>"']/g, (mark) => NAMES[mark] ?? mark);
