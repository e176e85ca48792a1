{{/* Ports, the same in every installation. */}}
{{- define "runner.ports" -}}
{"api": 7600, "ops": 7601, "agents": 7602}
{{- end -}}

{{- define "runner.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride -}}
{{- else -}}
{{- $name := default .Chart.Name .Values.nameOverride -}}
{{- if contains $name .Release.Name -}}{{ .Release.Name }}{{- else -}}{{ printf "%s-%s" .Release.Name $name }}{{- end -}}
{{- end -}}
{{- end -}}

{{/* A name with room for the longest suffix here. */}}
{{- define "runner.name" -}}
{{- include "runner.fullname" . | trunc 40 | trimSuffix "-" -}}
{{- end -}}

{{/* What the service's pod is selected by. */}}
{{- define "runner.selector" -}}
app.kubernetes.io/name: runner
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/component: service
{{- end -}}

{{- define "runner.labels" -}}
app.kubernetes.io/name: runner
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end -}}

{{/* An image: (root, the image's values). */}}
{{- define "runner.image" -}}
{{- $root := index . 0 -}}{{- $image := index . 1 -}}
{{- if $image.digest -}}
{{ $image.repository }}@{{ $image.digest }}
{{- else -}}
{{ $image.repository }}:{{ $image.tag | default $root.Chart.AppVersion }}
{{- end -}}
{{- end -}}

{{/* What the configuration has to say to be let beyond loopback. */}}
{{- define "runner.trust" -}}
whoever reaches the port is trusted
{{- end -}}

{{/* "true" where a backend is the cluster that the service runs in: then it needs its account's token, and rights. */}}
{{- define "runner.inCluster" -}}
{{- range .Values.config.backends -}}
{{- if and (eq .kind "k8sjob") (not .kubeconfig) -}}true{{- end -}}
{{- end -}}
{{- end -}}

{{/* "true" where pods have agents that dial the service. */}}
{{- define "runner.hasAgents" -}}
{{- range .Values.config.backends -}}
{{- if eq .kind "k8sjob" -}}true{{- end -}}
{{- end -}}
{{- end -}}

{{/* "true" where objects are in a bucket. */}}
{{- define "runner.bucket" -}}
{{- $url := dig "object_store" "url" "" .Values.config -}}
{{- if and $url (not (hasPrefix "file:" $url)) -}}true{{- end -}}
{{- end -}}

{{/* "true" where the state is in PostgreSQL. */}}
{{- define "runner.postgres" -}}
{{- if dig "store" "url" "" .Values.config -}}true{{- end -}}
{{- end -}}

{{/* The effective configuration: the values', and what only the chart can know. JSON, because numbers survive it. */}}
{{- define "runner.config" -}}
{{- $root := . -}}
{{- $ports := include "runner.ports" . | fromJson -}}
{{- $config := deepCopy .Values.config -}}
{{- $host := .Values.bindAddress -}}
{{- if contains ":" $host -}}{{- $host = printf "[%s]" $host -}}{{- end -}}
{{- $_ := set $config "data_dir" "/var/lib/runner/data" -}}
{{- $_ := set $config "listen" (printf "%s:%v" $host $ports.api) -}}
{{- $_ := set $config "ops_listen" (printf "%s:%v" $host $ports.ops) -}}
{{- if include "runner.hasAgents" . -}}
{{- $_ := set $config "agent_listen" (printf "%s:%v" $host $ports.agents) -}}
{{- end -}}
{{- if .Values.networkPolicies.enabled -}}
{{- $_ := set $config "unauthenticated_callers" (include "runner.trust" .) -}}
{{- else if not $config.unauthenticated_callers -}}
{{- fail (printf "config.unauthenticated_callers: networkPolicies.enabled is false, so nothing of this chart decides who reaches port %v, and callers are not authenticated. Where something else decides, say so: %q" $ports.api (include "runner.trust" .)) -}}
{{- end -}}
{{- $backends := list -}}
{{- range $i, $backend := $config.backends -}}
{{- if eq $backend.kind "k8sjob" -}}
{{- $known := dict "agent_image" (include "runner.image" (list $root $root.Values.agentImage)) -}}
{{- if $backend.kubeconfig -}}
{{- if not $backend.agent_url -}}
{{- fail (printf "config.backends[%d].agent_url: must be set: the pods of another cluster do not reach the Service of this one by its name" $i) -}}
{{- end -}}
{{- else -}}
{{- $known = merge $known (dict "namespace" $root.Values.workloads.namespace "service_account" (include "runner.workloadAccount" $root) "agent_url" (printf "http://%s-agents.%s.svc:%v" (include "runner.name" $root) $root.Release.Namespace $ports.agents)) -}}
{{- if ne ($backend.namespace | default $root.Values.workloads.namespace) $root.Values.workloads.namespace -}}
{{- fail (printf "config.backends[%d].namespace: is %q, but rights, account and policies are made in workloads.namespace, %q, only" $i $backend.namespace $root.Values.workloads.namespace) -}}
{{- end -}}
{{- if and $backend.enforces_network_policies (not $root.Values.networkPolicies.enabled) -}}
{{- fail (printf "config.backends[%d].enforces_network_policies: is true, but networkPolicies.enabled is false" $i) -}}
{{- end -}}
{{- end -}}
{{- $backend = merge $backend $known -}}
{{- end -}}
{{- $backends = append $backends $backend -}}
{{- end -}}
{{- $_ := set $config "backends" $backends -}}
{{- $config | toPrettyJson -}}
{{- end -}}

{{/* The account of workloads. It is bound to nothing. */}}
{{- define "runner.workloadAccount" -}}
{{ include "runner.name" . }}-workload
{{- end -}}

{{/* "true" where agents in this cluster dial an address, so that the network `none` needs no DNS. */}}
{{- define "runner.agentsByAddress" -}}
{{- $all := true -}}
{{- range .Values.config.backends -}}
{{- if and (eq .kind "k8sjob") (not .kubeconfig) -}}
{{- if not (regexMatch "^http://([0-9.]+|\\[[0-9a-fA-F:.]+\\])(:[0-9]+)?/?$" (.agent_url | default "")) -}}{{- $all = false -}}{{- end -}}
{{- end -}}
{{- end -}}
{{- if $all -}}true{{- end -}}
{{- end -}}

{{/* What does not fit together and no schema can tell. */}}
{{- define "runner.check" -}}
{{- if eq .Values.workloads.namespace .Release.Namespace -}}
{{- fail (printf "workloads.namespace: is %q, the namespace of the service: workloads need one of their own" .Release.Namespace) -}}
{{- end -}}
{{- if and .Values.caCertificates.configMap .Values.caCertificates.secret -}}
{{- fail "caCertificates.secret: caCertificates.configMap is set too; one of them is needed" -}}
{{- end -}}
{{- /* Without a single authority the client of a bucket is not even made, wherever the bucket is. */}}
{{- if and (include "runner.bucket" .) (not .Values.caCertificates.configMap) (not .Values.caCertificates.secret) -}}
{{- fail "caCertificates.configMap: is not set, and neither is caCertificates.secret: config.object_store.url is a bucket, and the image trusts no authority of its own" -}}
{{- end -}}
{{- if and (include "runner.postgres" .) (not (contains "sslmode=disable" .Values.config.store.url)) (not (dig "store" "ca_file" "" .Values.config)) (not .Values.caCertificates.configMap) (not .Values.caCertificates.secret) -}}
{{- fail "config.store.ca_file: is not set, and neither is one of caCertificates: config.store.url is reached by TLS, and the image trusts no authority of its own" -}}
{{- end -}}
{{- end -}}

{{/* The ports of a rule, one a line. */}}
{{- define "runner.tcp" -}}
{{- $lines := list -}}
{{- range . -}}{{- $lines = append $lines (printf "- { protocol: TCP, port: %v }" .) -}}{{- end -}}
{{- join "\n" $lines -}}
{{- end -}}

{{/* The rule that lets DNS out. */}}
{{- define "runner.dnsRule" -}}
- to:
    {{- toYaml .Values.networkPolicies.dns | nindent 4 }}
  ports:
    - { protocol: UDP, port: 53 }
    - { protocol: TCP, port: 53 }
{{- end -}}
