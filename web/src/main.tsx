import { render } from "preact";
import "./styles/main.css";
import { start } from "./chat/store";
import { App } from "./ui/app";

void start().then(() => {
  render(<App />, document.getElementById("app") as HTMLElement);
});
