// How an application starts a bundle: mcpb_config.mjs FOLDER ANSWERS, the answers to its form as JSON.
import { getMcpConfigForManifest } from '@anthropic-ai/mcpb';
import { readFileSync } from 'node:fs';
import { homedir } from 'node:os';
import { join, sep } from 'node:path';

const [folder, answers] = process.argv.slice(2);
const config = await getMcpConfigForManifest({
  manifest: JSON.parse(readFileSync(join(folder, 'manifest.json'), 'utf8')),
  extensionPath: folder,
  systemDirs: { HOME: homedir() },
  userConfig: JSON.parse(answers),
  pathSeparator: sep,
});
process.stdout.write(JSON.stringify(config ?? null));
