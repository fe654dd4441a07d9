{{/* Pods: one Deployment for each component, made of the same parts. */}}

{{- define "broker.podSecurity" -}}
runAsNonRoot: true
runAsUser: 10001
runAsGroup: 10001
fsGroup: 10001
fsGroupChangePolicy: OnRootMismatch
seccompProfile:
  type: RuntimeDefault
{{- end -}}

{{- define "broker.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
runAsNonRoot: true
capabilities:
  drop: [ALL]
{{- end -}}

{{/* A dict of root, component, routes (BROKER_ROUTES) and flags (more arguments of `serve`). */}}
{{- define "broker.deployment" -}}
{{- $values := index .root.Values .component -}}
apiVersion: apps/v1
kind: Deployment
metadata:
  name: {{ include "broker.fullname" .root }}-{{ .component }}
  namespace: {{ .root.Release.Namespace }}
  labels:
    {{- include "broker.labels" .root | nindent 4 }}
    app.kubernetes.io/component: {{ .component }}
spec:
  {{- if not $values.autoscaling.enabled }}
  replicas: {{ $values.replicas }}
  {{- end }}
  revisionHistoryLimit: 5
  minReadySeconds: 5
  strategy:
    type: RollingUpdate
    rollingUpdate:
      maxUnavailable: 0
      maxSurge: 1
  selector:
    matchLabels:
      {{- include "broker.instanceLabels" .root | nindent 6 }}
      app.kubernetes.io/component: {{ .component }}
  template:
    metadata:
      labels:
        {{- include "broker.labels" .root | nindent 8 }}
        app.kubernetes.io/component: {{ .component }}
        {{- if .measured }}
        credential-broker/metrics: "true"
        {{- end }}
        {{- with $values.podLabels }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
      {{- with $values.podAnnotations }}
      annotations:
        {{- toYaml . | nindent 8 }}
      {{- end }}
    spec:
      {{- include "broker.podSpec" . | nindent 6 }}
{{- end -}}

{{- define "broker.podSpec" -}}
{{- $values := index .root.Values .component -}}
serviceAccountName: {{ include "broker.serviceAccount" .root }}
automountServiceAccountToken: false
# A Service called broker would put BROKER_… variables here, and unknown ones stop the start.
enableServiceLinks: false
terminationGracePeriodSeconds: {{ $values.terminationGraceSeconds }}
{{- with .root.Values.imagePullSecrets }}
imagePullSecrets:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with $values.priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
securityContext:
  {{- include "broker.podSecurity" . | nindent 2 }}
{{- include "broker.placing" . }}
containers:
  - name: broker
    image: {{ include "broker.image" .root }}
    imagePullPolicy: {{ .root.Values.image.pullPolicy }}
    args: {{ concat (list "serve" "--host" "0.0.0.0" "--port" "8000") .flags | toJson }}
    ports:
      - name: http
        containerPort: 8000
        protocol: TCP
    env:
      - name: BROKER_ROUTES
        value: {{ .routes | quote }}
      - name: BROKER_DRAIN_SECONDS
        value: {{ $values.drainSeconds | quote }}
      - name: BROKER_GRACE_SECONDS
        value: {{ $values.graceSeconds | quote }}
      {{- include "broker.baseEnv" .root | nindent 6 }}
      {{- include "broker.servingEnv" .root | nindent 6 }}
      {{- with $values.extraEnv }}
      {{- toYaml . | nindent 6 }}
      {{- end }}
    {{- if or .root.Values.clientCredentials $values.extraEnvFrom }}
    envFrom:
      {{- range .root.Values.clientCredentials }}
      - secretRef:
          name: {{ . }}
      {{- end }}
      {{- with $values.extraEnvFrom }}
      {{- toYaml . | nindent 6 }}
      {{- end }}
    {{- end }}
    {{- include "broker.probes" . | nindent 4 }}
    resources:
      {{- toYaml $values.resources | nindent 6 }}
    securityContext:
      {{- include "broker.containerSecurity" . | nindent 6 }}
    volumeMounts:
      {{- include "broker.mounts" .root | nindent 6 }}
      {{- with $values.extraVolumeMounts }}
      {{- toYaml . | nindent 6 }}
      {{- end }}
volumes:
  {{- include "broker.volumes" .root | nindent 2 }}
  {{- with $values.extraVolumes }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- end -}}

{{- define "broker.probes" -}}
startupProbe:
  httpGet: { path: /health/live, port: http }
  periodSeconds: 2
  timeoutSeconds: 2
  failureThreshold: 60
livenessProbe:
  httpGet: { path: /health/live, port: http }
  periodSeconds: 10
  timeoutSeconds: 5
  failureThreshold: 6
readinessProbe:
  httpGet: { path: /health/ready, port: http }
  periodSeconds: 5
  timeoutSeconds: 4
  failureThreshold: 3
{{- end -}}

{{- define "broker.placing" -}}
{{- $values := index .root.Values .component }}
{{- if $values.topologySpread }}
topologySpreadConstraints:
  {{- range $values.topologySpread }}
  - maxSkew: 1
    topologyKey: {{ . }}
    whenUnsatisfiable: ScheduleAnyway
    matchLabelKeys: [pod-template-hash]
    labelSelector:
      matchLabels:
        {{- include "broker.instanceLabels" $.root | nindent 8 }}
        app.kubernetes.io/component: {{ $.component }}
  {{- end }}
{{- end }}
{{- with $values.nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with $values.tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with $values.affinity }}
affinity:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end -}}
