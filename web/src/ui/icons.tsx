// The page's own drawings, on a square of 20.

const PATHS = {
  plus: "M10 4v12M4 10h12",
  menu: "M3 5.5h14M3 10h14M3 14.5h9",
  close: "M5 5l10 10M15 5L5 15",
  sliders: "M3 6h7M14 6h3M3 14h3M10 14h7M12 4v4M8 12v4",
  send: "M10 16V4M5 9l5-5 5 5",
  stop: "M6 6h8v8H6z",
  copy: "M7 7h9v9H7zM4 13V4h9",
  check: "M4 10.5l4 4 8-9",
  again: "M15.5 8A6 6 0 1 0 16 11M16 4v4h-4",
  pencil: "M4 16l1-4 8-8 3 3-8 8zM11.5 5.5l3 3",
  more: "M4.5 10h.01M10 10h.01M15.5 10h.01",
  picture: "M3 4.5h14v11H3zM3 13l4-4 4 4 2-2 4 3M13 7.5h.01",
  receipt: "M5 3h10v14l-2.5-1.5L10 17l-2.5-1.5L5 17zM8 7h4M8 10.5h4",
  tokens: "M3 5h6v4H3zM11 5h6v4h-6zM3 11h4v4H3zM9 11h8v4H9z",
  left: "M12 5l-5 5 5 5",
  right: "M8 5l5 5-5 5",
  down: "M5 8l5 5 5-5",
  download: "M10 3v10M5.5 9l4.5 4.5L14.5 9M4 17h12",
  trash: "M4 6h12M8 6V4h4v2M6 6l.7 10h6.6L14 6",
  sun: "M10 6.5a3.5 3.5 0 1 0 0 7 3.5 3.5 0 0 0 0-7zM10 2v1.5M10 16.5V18M2 10h1.5M16.5 10H18M4.3 4.3l1.1 1.1M14.6 14.6l1.1 1.1M4.3 15.7l1.1-1.1M14.6 5.4l1.1-1.1",
  moon: "M16 11.5A6.5 6.5 0 0 1 8.5 4 6.5 6.5 0 1 0 16 11.5z",
  system: "M3 4h14v9H3zM7 16.5h6M10 13v3.5",
  key: "M8 8.5a3.5 3.5 0 1 0-3.5 3.5A3.5 3.5 0 0 0 8 8.5zM7 11l8 6M12.5 15l1.5-2",
} as const;

export type IconName = keyof typeof PATHS;

export function Icon({ name }: { name: IconName }) {
  return (
    <svg class="icon" viewBox="0 0 20 20" aria-hidden="true">
      <path d={PATHS[name]} />
    </svg>
  );
}

/** The mark: a book that lies open. */
export function BookMark() {
  return (
    <svg class="book-mark" viewBox="0 0 32 32" aria-hidden="true">
      <path class="book-page" d="M16 9C12.5 6.6 8 6 3 6.8v17.4c5-.8 9.5-.2 13 2.2z" />
      <path class="book-page" d="M16 9c3.5-2.4 8-3 13-2.2v17.4c-5-.8-9.5-.2-13 2.2z" />
      <path
        class="book-line"
        d="M6.5 11.3c2.3-.2 4.4 0 6.5.8M6.5 15.3c2.3-.2 4.4 0 6.5.8M6.5 19.3c2.3-.2 4.4 0 6.5.8"
      />
      <path class="book-tick" d="M19 16l2.6 2.8 4.6-6.3" />
    </svg>
  );
}

interface IconButtonProps {
  icon: IconName;
  label: string;
  onClick: () => void;
  class?: string;
  isDisabled?: boolean;
  isPressed?: boolean;
}

/** A button that shows a drawing only; its label is its name and its tip. */
export function IconButton({ icon, label, onClick, class: className = "", isDisabled, isPressed }: IconButtonProps) {
  return (
    <button
      type="button"
      class={`icon-button ${className}`}
      aria-label={label}
      title={label}
      disabled={isDisabled}
      aria-pressed={isPressed}
      onClick={onClick}
    >
      <Icon name={icon} />
    </button>
  );
}
